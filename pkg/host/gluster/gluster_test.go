package gluster

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

func TestTheLogOfAFailedMountHasAReason(t *testing.T) {
	status := func(n int) error { return &host.ExitError{Result: host.Result{ExitCode: n}} }
	for name, want := range map[string]struct {
		err   error
		kind  fault.Kind
		tells string
	}{
		"novol":    {status(2), fault.Invalid, `no volume "vol"`},
		"noserver": {status(107), fault.Unavailable, "no server answers on port 24007: a, b"},
		"name":     {status(107), fault.Unavailable, "name of server no.such.host.invalid"},
		"nosub":    {unix.ENOTCONN, fault.NotFound, `volume "vol" has no folder "k8s/data"`},
		"auth":     {unix.ENOTCONN, fault.Permission, "auth.allow"},
		"bricks":   {unix.ENOTCONN, fault.Unavailable, "gluster volume status vol"},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := os.ReadFile(filepath.Join("testdata/log", name))
			if err != nil {
				t.Fatal(err)
			}
			err = explain(Mount{Servers: []string{"a", "b"}, Volume: "vol", Folder: "k8s/data"}, string(b), want.err)
			if fault.KindOf(err) != want.kind || !strings.Contains(err.Error(), want.tells) || !strings.Contains(err.Error(), "a,b:/vol/k8s/data") {
				t.Errorf("%v (%v), want kind %v, what was mounted, and %q", err, fault.KindOf(err), want.kind, want.tells)
			}
		})
	}
}

func TestAReasonThatNobodyKnowsIsTheLogsLastError(t *testing.T) {
	log := "[2026-11-30 13:33:55.80 +0000] E [MSGID: 114058] [client-handshake.c:1193:client_query] 0-v-client-0: the moon is full [] \n" +
		"[2026-11-30 13:33:56.81 +0000] W [glusterfsd.c:1458:cleanup_and_exit] 0-: shutting down \n"
	err := explain(Mount{Servers: []string{"a"}, Volume: "v"}, log, unix.ENOTCONN)
	if !errors.Is(err, fault.Unavailable) || !strings.HasSuffix(err.Error(), "0-v-client-0: the moon is full []") {
		t.Error(err)
	}
}

func TestAFileIsNoFolderToMount(t *testing.T) {
	err := explain(Mount{Servers: []string{"a"}, Volume: "v", Folder: "file"}, "", unix.EIO)
	if !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), `"file" is not a folder`) {
		t.Error(err)
	}
}

// TestAHangingProgramLeavesItsKind: whoever waits in vain is told that, not what a log may say by chance.
func TestAHangingProgramLeavesItsKind(t *testing.T) {
	err := explain(Mount{Servers: []string{"a"}, Volume: "v"}, "", fault.Wrap(fault.Deadline, context.DeadlineExceeded))
	if !errors.Is(err, fault.Deadline) {
		t.Error(err)
	}
}

func TestAMissingProgramIsNamedWithItsPackage(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := New(host.Exec{}, host.NewLocal(host.Exec{})).Mount(t.Context(), Mount{Servers: []string{"a"}, Volume: "v", Target: t.TempDir()})
	if !errors.Is(err, fault.Unsupported) || !strings.Contains(err.Error(), `"glusterfs-client"`) {
		t.Error(err)
	}
}

// graph makes the folder that a fixture describes.
func graph(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name+".meta"))
	if err != nil {
		t.Fatal(err)
	}
	dir, file := t.TempDir(), ""
	for line := range strings.Lines(string(b)) {
		head, ok := strings.CutPrefix(strings.TrimSuffix(line, " --\n"), "-- ")
		if ok {
			path, link, isLink := strings.Cut(head, " -> ")
			file = filepath.Join(dir, path)
			err = os.MkdirAll(filepath.Dir(file), 0o755)
			if isLink {
				err = errors.Join(err, os.Symlink(link, file))
			}
		} else {
			var old []byte
			old, _ = os.ReadFile(file)
			err = os.WriteFile(file, append(old, line...), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestAClientKnowsItsBricks(t *testing.T) {
	up := func(names ...string) (out []Brick) {
		for _, n := range names {
			out = append(out, Brick{Name: "198.51.100.2:/tmp/gl/" + n, Up: true})
		}
		return out
	}
	down := func(b []Brick, which ...int) []Brick {
		for _, i := range which {
			b[i].Up = false
		}
		return b
	}
	for name, want := range map[string]struct {
		State
		up, splits bool
	}{
		"replica2-down": {State{Groups: []Group{{Kind: "replicate", Quorum: "none", Up: true, Bricks: down(up("b0/brick", "b1/brick"), 1)}}}, true, true},
		"arbiter":       {State{Groups: []Group{{Kind: "replicate", Quorum: "auto", Up: true, Arbiter: true, Bricks: up("b0/a1", "b0/a2", "b0/a3")}}}, true, false},
		"disperse-down": {State{Groups: []Group{{Kind: "disperse", Redundancy: 1, Up: true, Bricks: down(up("b0/e1", "b0/e2", "b0/e3"), 1)}}}, true, false},
		"single":        {State{Groups: []Group{{Up: true, Bricks: up("b0/o1")}}}, true, false},
		"distributed-down": {State{Groups: []Group{
			{Kind: "replicate", Quorum: "none", Up: true, Bricks: up("b0/d1", "b0/d2")},
			{Kind: "replicate", Quorum: "none", Bricks: down(up("b0/d3", "b0/d4"), 0, 1)},
		}}, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := look(graph(t, name))
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, want.State) {
				t.Errorf("got  %+v\nwant %+v", got, want.State)
			}
			if got.Up() != want.up || slices.ContainsFunc(got.Groups, Group.Splits) != want.splits {
				t.Errorf("up: %v, splits: %v, want %v and %v", got.Up(), !want.splits, want.up, want.splits)
			}
		})
	}
}

func TestWhatIsNoGraphIsAnError(t *testing.T) {
	if _, err := look(t.TempDir()); err == nil {
		t.Error("an empty folder passes for a graph")
	}
	if _, err := look(filepath.Join(t.TempDir(), "nothing")); err == nil {
		t.Error("nothing passes for a graph")
	}
}
