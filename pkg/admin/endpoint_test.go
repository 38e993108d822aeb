package admin

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Whatever the umask, and from the first moment on: a mode that was changed
// after the socket was there would have been another before.
func TestASocketIsNeverOpenToOthers(t *testing.T) {
	for _, c := range []struct {
		name   string
		listen func(Endpoint) (net.Listener, error)
		mode   os.FileMode
	}{{"owner", Endpoint.Listen, 0o600}, {"group", Endpoint.ListenGroup, 0o660}} {
		for _, umask := range []int{0, 0o022, 0o077} {
			t.Run(fmt.Sprintf("%s with umask %03o", c.name, umask), func(t *testing.T) {
				dir := t.TempDir()
				e, err := ParseEndpoint(filepath.Join(dir, "a.sock"))
				if err != nil {
					t.Fatal(err)
				}
				watch, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
				if err != nil {
					t.Fatal(err)
				}
				defer unix.Close(watch)
				if _, err := unix.InotifyAddWatch(watch, dir, unix.IN_CREATE|unix.IN_ATTRIB); err != nil {
					t.Fatal(err)
				}
				old := unix.Umask(umask)
				l, err := c.listen(e)
				unix.Umask(old)
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
				if info, err := os.Stat(e.Path()); err != nil || info.Mode() != os.ModeSocket|c.mode {
					t.Errorf("mode %v, %v, want %v", info.Mode(), err, c.mode)
				}
				buf := make([]byte, 4096)
				n, err := unix.Read(watch, buf)
				if err != nil {
					t.Fatalf("nothing was made: %v", err)
				}
				var made, changed int
				for at := 0; at < n; {
					event := (*unix.InotifyEvent)(unsafe.Pointer(&buf[at]))
					if event.Mask&unix.IN_CREATE != 0 {
						made++
					} else {
						changed++
					}
					at += unix.SizeofInotifyEvent + int(event.Len)
				}
				// A umask only takes away: what it took is given back afterwards.
				if made != 1 || changed > 0 && umask&int(c.mode) == 0 {
					t.Errorf("made %d times, then changed %d times", made, changed)
				}
			})
		}
	}
}
