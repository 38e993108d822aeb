package host

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/hosttest/hangfs"
)

// A file that is open here, on storage that does not answer, hangs a process that closes it.
// Programs are started all the same.
func TestProgramsStartWhileStorageHangs(t *testing.T) {
	if theStarter.shared != nil {
		t.Fatalf("the thread that starts programs has no files of its own: %v", theStarter.shared)
	}
	fs := hangfs.New(t, 1<<20)
	f, err := os.OpenFile(fs.File, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	fs.Hang(func(op hangfs.Op) bool { return op == hangfs.Flush })

	res, err := Exec{}.Run(t.Context(), Command{Name: "cat", Stdin: strings.NewReader("said"), Timeout: time.Minute})
	if err != nil || string(res.Stdout) != "said" {
		t.Errorf("%q, %v", res.Stdout, err)
	}
	_, conn := startChild(t, ChildConfig{}, "echo")
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	dog, err := startWatchdog(int(null.Fd()), nil, time.Minute) // it has no device to resume
	if err != nil {
		t.Error(err)
	} else {
		dog.dismiss()
		if !dog.wait() || dog.close() != nil {
			t.Error("the watchdog did not end as it should")
		}
	}

	// The same the usual way: this is what would happen.
	started := make(chan error, 1)
	go func() { started <- exec.Command("true").Run() }()
	fs.Held(t)
	select {
	case err := <-started:
		t.Errorf("a program that was started the usual way has ended (%v): nothing was tried here", err)
	default:
	}
	fs.Release()
	if err := <-started; err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// What the runtime does on whatever thread it is must work on this one as well.
func TestTheRuntimeWorksOnTheStartersThread(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	heard := make(chan error, 1)
	go func() {
		_, err := r.Read(make([]byte, 1)) // waited for with epoll
		heard <- err
	}()
	ticks := make(chan time.Time, 1)
	if err := theStarter.apart(nil, func([]int) {
		for range 20 {
			runtime.GC()
			time.AfterFunc(time.Microsecond, func() {
				select {
				case ticks <- time.Now():
				default:
				}
			})
			<-ticks
			time.Sleep(time.Millisecond)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := <-heard; err != nil {
		t.Fatal(err)
	}
}

func TestTheStarterKeepsNoFiles(t *testing.T) {
	open := func() (list []string) {
		if err := theStarter.apart(nil, func([]int) {
			all, err := os.ReadDir("/proc/thread-self/fd")
			if err != nil {
				t.Error(err)
			}
			for _, f := range all {
				to, _ := os.Readlink(filepath.Join("/proc/thread-self/fd", f.Name())) // the listing itself is gone
				list = append(list, f.Name()+" "+to)
			}
		}); err != nil {
			t.Fatal(err)
		}
		return list
	}
	before := open()
	var many []int
	for range 200 {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		many = append(many, int(f.Fd()))
	}
	if err := theStarter.apart(many, func(fds []int) {
		if len(fds) != len(many) {
			t.Errorf("%d files came", len(fds))
		}
	}); err != nil {
		t.Fatal(err)
	}
	if after := open(); len(after) != len(before) || len(after) > 8 {
		t.Errorf("before: %q\nafter: %q", before, after)
	}
}

func TestWhatProgramsAreGivenAndSay(t *testing.T) {
	run := func(script string, stdin string, limit time.Duration) (Result, error) {
		return Exec{}.Run(t.Context(), Command{Name: "sh", Args: []string{"-c", script}, Stdin: strings.NewReader(stdin), Timeout: limit})
	}
	t.Setenv("LC_ALL", "de_DE")
	long := strings.Repeat("x", 1<<20)
	res, err := run(`cat; echo "$LC_ALL" >&2; ls /proc/self/fd >&2`, long, time.Minute)
	if err != nil || string(res.Stdout) != long || string(res.Stderr) != "C\n0\n1\n2\n3\n" {
		t.Errorf("%d bytes, %q, %v", len(res.Stdout), res.Stderr, err)
	}
	var exit *ExitError
	res, err = run("echo a; echo b >&2; exit 3", long, time.Minute) // input that nobody reads
	if !errors.As(err, &exit) || res.ExitCode != 3 || string(res.Stdout) != "a\n" || err.Error() != "sh -c echo a; echo b >&2; exit 3: exit status 3: b" {
		t.Errorf("%+v, %v", res, err)
	}
	if _, err = run("sleep 60", "", 50*time.Millisecond); !errors.Is(err, fault.Deadline) {
		t.Errorf("a limit: %v", err)
	}
	if res, err = run("kill -9 $$", "", time.Minute); !errors.As(err, &exit) || res.ExitCode != -1 {
		t.Errorf("killed: %+v, %v", res, err)
	}
	if res, err = run("echo a; sleep 60 & echo $!", "", time.Minute); !errors.Is(err, exec.ErrWaitDelay) || !strings.HasPrefix(string(res.Stdout), "a\n") {
		t.Errorf("output that stays open: %q, %v", res.Stdout, err)
	}
	if _, err := (Exec{}).Run(t.Context(), Command{Name: "no-such-program"}); !errors.Is(err, fault.Unsupported) {
		t.Errorf("not there: %v", err)
	}
	if _, err := (Exec{}).Run(t.Context(), Command{Name: "/no/such/program"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("not there, by its path: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := (Exec{}).Run(ctx, Command{Name: "true"}); !errors.Is(err, fault.Canceled) {
		t.Errorf("canceled before: %v", err)
	}
}
