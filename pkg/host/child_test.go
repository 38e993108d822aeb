package host

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// beChild makes the test binary a Child that does what its arguments say:
//
//	echo         answer each line
//	fail TEXT    say it on standard error, and end with status 3
//	stay         stay when the connection is closed
//	confine DIR  be confined, and then try what is forbidden
const beChild = "QUARRY_TEST_CHILD"

func child() {
	if os.Args[1] == "confine" {
		fmt.Fprintln(os.Stderr, RunConfined([]uint{unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE}, os.Args[2], "confined", os.Args[2]))
		os.Exit(5)
	}
	conn, err := InheritedConn()
	if err != nil {
		println(err.Error())
		os.Exit(4)
	}
	switch os.Args[1] {
	case "echo":
		_, _ = io.Copy(conn, conn)
	case "fail":
		fmt.Fprintf(os.Stderr, "first\n%s\nno end of line", os.Args[2])
		os.Exit(3)
	case "stay":
		fmt.Fprintln(os.Stderr, "here")
		time.Sleep(time.Hour)
	case "confined":
		tried(conn, os.Args[2])
	}
	os.Exit(0)
}

// tried tells what a confined process can do.
func tried(conn net.Conn, dir string) {
	say := func(what string, err error) { fmt.Fprintf(conn, "%s: %v\n", what, err) }
	say("args", errors.New(strings.Join(os.Args[3:], " ")))
	say("write inside", errors.Join(os.Mkdir(dir+"/tmp", 0o755), os.WriteFile(dir+"/tmp/a", []byte("a"), 0o600), os.Link(dir+"/tmp/a", dir+"/a"), os.Rename(dir+"/tmp/a", dir+"/b"), os.Remove(dir+"/tmp")))
	say("truncate inside", os.Truncate(dir+"/a", 5))
	outside := filepath.Dir(dir)
	say("write outside", os.WriteFile(outside+"/new", nil, 0o600))
	say("change outside", os.WriteFile(outside+"/file", []byte("x"), 0o600))
	say("truncate outside", os.Truncate(outside+"/file", 0))
	say("remove outside", os.Remove(outside+"/file"))
	say("move out", os.Rename(dir+"/b", outside+"/b"))
	_, err := os.ReadFile(outside + "/file")
	say("read outside", err)
	say("mount", unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	say("chown", os.Chown(dir+"/a", 1, 1))
	out, err := exec.Command("cat", "/proc/self/status").Output() // what programs get that it runs
	say("program", err)
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "CapEff") || strings.HasPrefix(line, "NoNewPrivs") || strings.HasPrefix(line, "Uid") {
			fmt.Fprint(conn, line)
		}
	}
}

// start starts this test binary as a Child.
func startChild(t *testing.T, c ChildConfig, args ...string) (*Child, net.Conn) {
	t.Helper()
	t.Setenv(beChild, "1")
	c.Name, c.Args = "/proc/self/exe", args
	ch, conn, err := StartChild(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); ch.Kill(0) })
	return ch, conn
}

func TestAChildSpeaksAndEndsWithItsConnection(t *testing.T) {
	ch, conn := startChild(t, ChildConfig{}, "echo")
	if _, err := conn.Write([]byte("hello\n")); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || line != "hello\n" {
		t.Errorf("%q, %v", line, err)
	}
	if how := ch.Ended(); how != "" || ch.Wait(0) {
		t.Errorf("it has ended: %s", how)
	}
	conn.Close()
	if !ch.Wait(time.Minute) || ch.Ended() != "exit status 0" {
		t.Errorf("ended: %s", ch.Ended())
	}
}

func TestAChildsLastWordsAreKept(t *testing.T) {
	var said []string
	ch, _ := startChild(t, ChildConfig{Said: func(line string) { said = append(said, line) }}, "fail", strings.Repeat("x", longestLine+1))
	if !ch.Wait(time.Minute) {
		t.Fatal("it has not ended")
	}
	if want := "exit status 3: no end of line"; ch.Ended() != want {
		t.Errorf("ended with %q, want %q", ch.Ended(), want)
	}
	if !slices.Equal(said, []string{"first", strings.Repeat("x", longestLine+1), "no end of line"}) {
		t.Errorf("said %.100q", said)
	}
}

func TestAChildThatStaysIsKilled(t *testing.T) {
	here := make(chan string, 1)
	ch, conn := startChild(t, ChildConfig{Said: func(line string) { here <- line }}, "stay")
	<-here
	conn.Close()
	if !ch.Kill(time.Millisecond) || ch.Ended() != "signal: killed: here" {
		t.Errorf("ended: %q", ch.Ended())
	}
	if err := syscall.Kill(ch.PID(), 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("process %d: %v", ch.PID(), err)
	}
}

// TestAConfinedChildCanDoNoMore: as root, and as a user of its own.
func TestAConfinedChildCanDoNoMore(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to give things up")
	}
	for _, uid := range []uint32{0, 4711} {
		t.Run(fmt.Sprint(uid), func(t *testing.T) {
			outside, err := os.MkdirTemp("", "q-")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(outside) })
			dir := outside + "/d"
			if err := errors.Join(os.Chmod(outside, 0o777), os.WriteFile(outside+"/file", []byte("stays"), 0o666), os.Mkdir(dir, 0o755), os.Chown(dir, int(uid), int(uid))); err != nil {
				t.Fatal(err)
			}
			ch, conn := startChild(t, ChildConfig{UID: uid, GID: uid, Capabilities: []uint{unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE}}, "confine", dir)
			answer, err := io.ReadAll(conn)
			if err != nil || !ch.Wait(time.Minute) {
				t.Fatal(err, ch.Ended())
			}
			var have []string
			for line := range strings.Lines(string(answer)) {
				line = strings.TrimSpace(line)
				for _, e := range []string{"permission denied", "operation not permitted", "invalid cross-device link"} {
					if what, _, failed := strings.Cut(line, ": "); failed && strings.HasSuffix(line, e) {
						line = what + ": " + e
					}
				}
				have = append(have, line)
			}
			want := []string{"args: --confined writing", "write inside: <nil>", "truncate inside: <nil>",
				"write outside: permission denied", "change outside: permission denied", "truncate outside: permission denied", "remove outside: permission denied", "move out: permission denied",
				"read outside: <nil>", "mount: operation not permitted", "chown: <nil>", "program: <nil>",
				fmt.Sprintf("Uid:\t%d\t%[1]d\t%[1]d\t%[1]d", uid), "CapEff:\t0000000000000003", "NoNewPrivs:\t1"}
			if slices.Contains(have, "args: --confined capabilities") {
				t.Skip("the kernel has no Landlock")
			}
			if !slices.Equal(have, want) {
				t.Errorf("have\n%s\nwant\n%s\nended: %s", strings.Join(have, "\n"), strings.Join(want, "\n"), ch.Ended())
			}
		})
	}
}
