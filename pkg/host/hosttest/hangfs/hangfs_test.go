package hangfs

import (
	"bytes"
	"os"
	"testing"
)

func TestItIsAFileThatHangsAndComesBack(t *testing.T) {
	fs := New(t, 1<<20)
	f, err := os.OpenFile(fs.File, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := bytes.Repeat([]byte("quarry"), 700)
	if _, err := f.WriteAt(want, 300000); err != nil {
		t.Fatal(err)
	}
	fs.Hang(func(op Op) bool { return op == Read })
	got, read := make([]byte, len(want)), make(chan error, 1)
	go func() {
		_, err := f.ReadAt(got, 300000)
		read <- err
	}()
	fs.Held(t)
	if fi, err := f.Stat(); err != nil || fi.Size() != 1<<20 {
		t.Fatalf("%v %v", fi, err) // only reading hangs
	}
	select {
	case err := <-read:
		t.Fatalf("it was read although it hangs: %v", err)
	default:
	}
	fs.Release()
	if err := <-read; err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read back otherwise: %v", err)
	}
}
