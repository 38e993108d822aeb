package mover

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// over runs both halves of a copy with a connection between them.
func over(send func(io.Writer) error, receive func(io.Reader) error) (sent, received error) {
	r, w := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := send(w)
		ended <- err
		_ = w.CloseWithError(err) // as a connection ends
	}()
	received = receive(r)
	_ = r.Close()
	return <-ended, received
}

func moveBlock(ctx context.Context, m *Mover, src, dst string, o image.BlockCopy) error {
	sent, received := over(func(w io.Writer) error { return m.SendBlock(ctx, src, o, w) }, func(r io.Reader) error { return m.ReceiveBlock(ctx, dst, o, r) })
	return errors.Join(sent, received)
}

// TestABlockCopyBetweenHostsIsEqualKeepsHolesAndResumes: any layout, broken off anywhere.
func TestABlockCopyBetweenHostsIsEqualKeepsHolesAndResumes(t *testing.T) {
	dir := t.TempDir()
	m := New(Options{Buffer: 64 << 10, CheckpointEvery: 256 << 10})
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		src, dst := filepath.Join(dir, fmt.Sprint("src", n)), filepath.Join(dir, fmt.Sprint("dst", n))
		size := rapid.Int64Range(0, 4*mib).Draw(rt, "size")
		var data []extent
		for range rapid.IntRange(0, 4).Draw(rt, "extents") {
			if off := rapid.Int64Range(0, 4*mib).Draw(rt, "off"); off < size {
				data = append(data, extent{off, min(size-off, rapid.Int64Range(1, mib).Draw(rt, "n"))})
			}
		}
		makeSparse(t, src, size, data)
		zeroed := rapid.Bool().Draw(rt, "zeroed")
		if zeroed {
			makeEmpty(t, dst, size)
		} else {
			makeSparse(t, dst, size, []extent{{0, size}})
		}
		defer os.Remove(src)
		defer os.Remove(dst)
		stop, durable := rapid.IntRange(0, 3).Draw(rt, "checkpoint at which it breaks off"), int64(0)
		broken := errors.New("broken off")
		o := image.BlockCopy{Size: size, DstZeroed: zeroed, Checkpoint: func(off int64) error {
			if stop--; stop < 0 {
				return broken
			}
			if off <= durable {
				rt.Fatalf("checkpoint %d after %d", off, durable)
			}
			durable = off
			return nil
		}}
		err := moveBlock(context.Background(), m, src, dst, o)
		if err != nil && !errors.Is(err, broken) {
			rt.Fatal(err)
		}
		if err != nil {
			o.From, o.Checkpoint = durable, nil
			if err := moveBlock(context.Background(), m, src, dst, o); err != nil {
				rt.Fatal(err)
			}
		}
		if sum(t, src, size) != sum(t, dst, size) {
			rt.Fatal("the copy is another")
		}
		if a, b := blocks(t, src), blocks(t, dst); zeroed && b > a+2*sparseUnit/512 {
			rt.Fatalf("the copy takes %d blocks, its source %d", b, a)
		}
	})
}

func TestABlockCopyBetweenHostsSaysWhy(t *testing.T) {
	dir := t.TempDir()
	m := New(Options{})
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	makeSparse(t, src, mib, []extent{{0, mib}})
	makeEmpty(t, dst, mib)
	move := func(size int64) (error, error) {
		o := image.BlockCopy{Size: size}
		return over(func(w io.Writer) error { return m.SendBlock(t.Context(), src, o, w) }, func(r io.Reader) error { return m.ReceiveBlock(t.Context(), dst, o, r) })
	}
	sent, _ := move(2 * mib)
	wantKind(t, sent, fault.Corrupt)
	makeSparse(t, src, 2*mib, nil)
	_, received := move(2 * mib)
	wantKind(t, received, fault.Invalid)
	var whole bytes.Buffer
	o := image.BlockCopy{Size: mib}
	makeSparse(t, src, mib, []extent{{0, mib}})
	if err := m.SendBlock(t.Context(), src, o, &whole); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, 10, 17, whole.Len() / 2, whole.Len() - 17, whole.Len() - 1} {
		wantKind(t, m.ReceiveBlock(t.Context(), dst, o, bytes.NewReader(whole.Bytes()[:n])), fault.Unavailable)
	}
	wantKind(t, m.ReceiveBlock(t.Context(), dst, image.BlockCopy{Size: mib - 1}, bytes.NewReader(whole.Bytes())), fault.Internal)
	garbage := make([]byte, 1<<20)
	random := rand.NewChaCha8([32]byte{7})
	for range 100 {
		_, _ = random.Read(garbage)
		if err := m.ReceiveBlock(t.Context(), dst, o, bytes.NewReader(garbage)); err == nil {
			t.Fatal("garbage is a copy")
		}
	}
}

func moveTree(ctx context.Context, m *Mover, src, dst string, progress func(done, total int64)) error {
	sent, received := over(func(w io.Writer) error { return m.SendTree(ctx, src, w) }, func(r io.Reader) error { return m.ReceiveTree(ctx, dst, progress, r) })
	return errors.Join(sent, received)
}

func TestATreeBetweenHostsKeepsEverything(t *testing.T) {
	dir := t.TempDir()
	src, dst := sub(t, dir, "src"), sub(t, dir, "dst")
	plant(t, src, false)
	stamp(t, src)
	plant(t, dst, false) // an earlier copy, which is replaced
	m := New(Options{Buffer: 64 << 10})
	var last, total int64
	if err := moveTree(t.Context(), m, src, dst, func(d, n int64) { last, total = d, n }); err != nil {
		t.Fatal(err)
	}
	sameTree(t, src, dst)
	if last != total || total < 16*mib {
		t.Errorf("progress ended at %d of %d", last, total)
	}
}

// TestAFileThatChangesWhileItMovesIsAsItIsInTheEnd: with what it has not any more, too.
func TestAFileThatChangesWhileItMovesIsAsItIsInTheEnd(t *testing.T) {
	for what, size := range map[string]int64{"shorter": 1000, "as long": mib, "longer": 2 * mib, "empty": 0} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			src, dst := sub(t, dir, "src"), sub(t, dir, "dst")
			file := filepath.Join(src, "f")
			makeSparse(t, file, mib, []extent{{0, mib}})
			must := func(errs ...error) {
				t.Helper()
				if err := errors.Join(errs...); err != nil {
					t.Fatal(err)
				}
			}
			must(os.Link(file, filepath.Join(src, "g")), os.Chmod(file, 0o755),
				unix.Setxattr(file, "user.gone", []byte("x"), 0), unix.Setxattr(file, "user.changed", []byte("one"), 0))
			root := os.Geteuid() == 0
			if root {
				must(os.Chown(file, 1234, 1234))
			}
			stamp(t, src)
			change := sync.OnceFunc(func() {
				err := errors.Join(os.WriteFile(file, bytes.Repeat([]byte{7}, int(size)), 0), os.Chmod(file, 0o600),
					unix.Removexattr(file, "user.gone"), unix.Setxattr(file, "user.changed", []byte("two"), 0))
				if root {
					err = errors.Join(err, os.Chown(file, 0, 0))
				}
				if err = errors.Join(err, os.Chtimes(file, time.Unix(3e8, 0), time.Unix(4e8, 5))); err != nil {
					t.Error(err)
				}
			})
			m := New(Options{Buffer: 64 << 10})
			sent, received := over(func(w io.Writer) error {
				return m.SendTree(t.Context(), src, &middle{w, 512 << 10, change})
			}, func(r io.Reader) error { return m.ReceiveTree(t.Context(), dst, nil, r) })
			must(sent, received)
			sameTree(t, src, dst)
			if got := readAt(t, filepath.Join(dst, "g"), 0, size); !bytes.Equal(got, bytes.Repeat([]byte{7}, int(size))) {
				t.Error("the copy has what the file had before")
			}
		})
	}
}

// middle calls do after so many bytes were written.
type middle struct {
	io.Writer
	left int
	do   func()
}

func (m *middle) Write(b []byte) (int, error) {
	if m.left -= len(b); m.left <= 0 {
		m.do()
	}
	return m.Writer.Write(b)
}

// TestATreeFromAHostThatLiesStaysInItsPlace: what is sent makes nothing outside of the target.
func TestATreeFromAHostThatLiesStaysInItsPlace(t *testing.T) {
	dir := t.TempDir()
	m := New(Options{})
	root := wireNode{Name: []byte(".quarry-links-0"), Mode: 0o40755}
	for what, send := range map[string]func(w *wireWriter) error{
		"a path":        func(w *wireWriter) error { return w.entry(wireEntry, wireNode{Name: []byte("../evil"), Mode: 0o40755}) },
		"above":         func(w *wireWriter) error { return w.entry(wireEntry, wireNode{Name: []byte(".."), Mode: 0o40755}) },
		"no name":       func(w *wireWriter) error { return w.entry(wireEntry, wireNode{Mode: 0o100644}) },
		"out of itself": func(w *wireWriter) error { return w.frame(wireHead{kind: wireLeave}, nil) },
		"a link to what was not sent": func(w *wireWriter) error {
			return w.entry(wireEntry, wireNode{Name: []byte("l"), Mode: 0o100644, File: 1, Further: true})
		},
		"a huge entry": func(w *wireWriter) error { return w.frame(wireHead{wireEntry, 0, 1 << 40}, nil) },
		"through a link": func(w *wireWriter) error {
			return errors.Join(w.entry(wireEntry, wireNode{Name: []byte("l"), Mode: 0o120777, Target: []byte(dir)}), w.entry(wireEntry, wireNode{Name: []byte("l"), Mode: 0o40755}))
		},
		"too much content": func(w *wireWriter) error {
			return errors.Join(w.entry(wireEntry, wireNode{Name: []byte("f"), Mode: 0o100644, Size: 1}), w.data(0, []byte("ab")))
		},
		"the end within": func(w *wireWriter) error {
			return errors.Join(w.entry(wireEntry, wireNode{Name: []byte("d"), Mode: 0o40755}), w.frame(wireHead{kind: wireEnd}, nil))
		},
	} {
		t.Run(what, func(t *testing.T) {
			dst := sub(t, dir, "dst of "+what)
			var b bytes.Buffer
			w := newWireWriter(&b)
			if err := errors.Join(w.entry(wireEntry, root), send(w), w.frame(wireHead{kind: wireEnd}, nil), w.flush()); err != nil {
				t.Fatal(err)
			}
			if err := m.ReceiveTree(t.Context(), dst, nil, &b); err == nil {
				t.Error("it is taken")
			}
			if _, err := os.Lstat(filepath.Join(dir, "evil")); err == nil {
				t.Error("something was made outside")
			}
		})
	}
	for name, r := range map[string]wireNode{"a file": {Name: root.Name, Mode: 0o100644}, "a stash elsewhere": {Name: []byte(".quarry-links-/../../evil"), Mode: 0o40755}} {
		var b bytes.Buffer
		w := newWireWriter(&b)
		if err := errors.Join(w.entry(wireEntry, r), w.frame(wireHead{kind: wireEnd}, nil), w.flush()); err != nil {
			t.Fatal(err)
		}
		wantKind(t, m.ReceiveTree(t.Context(), sub(t, dir, "dst of "+name), nil, &b), fault.Internal)
	}
}
