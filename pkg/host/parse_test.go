package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
)

func TestMountInfo(t *testing.T) {
	// Linux 6.18, with optional fields of several lengths and an escaped blank.
	const text = `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:7 - ext3 /dev/root ro,errors=continue
41 25 0:38 / /srv/a\040b\134c ro,relatime - tmpfs quarry:d/v ro,size=4k
`
	got, err := parseMountInfo(text)
	if err != nil || len(got) != 2 {
		t.Fatalf("%v %v", got, err)
	}
	if m := got[0]; m.ID != 36 || m.Parent != 35 || m.Major != 98 || m.Root != "/mnt1" || m.Point != "/mnt2" || m.Type != "ext3" || m.Source != "/dev/root" || !m.TurnedReadOnly() {
		t.Errorf("%+v", m)
	}
	if m := got[1]; m.Point != `/srv/a b\c` || m.Source != "quarry:d/v" || m.TurnedReadOnly() || !m.ReadOnly() {
		t.Errorf("%+v", m)
	}
	for _, bad := range []string{"36 35 98:0 / /x rw", "x 35 98:0 / /x rw - a b c", "36 35 98 / /x rw - a b c"} {
		if _, err := parseMountInfo(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

// In the form of Linux 6.1: a directory volume's own mount, what is bound of it where it is staged, another volume of the same export,
// and a part of the first, as a container's subPath is.
func TestMountsOfOneExportAreToldApart(t *testing.T) {
	const text = `80 28 0:52 / /run/quarry/mounts/A/t3 rw,relatime shared:1 - nfs4 198.18.199.1:/vda-xfs/k8s/slabs/a rw,vers=4.2,addr=198.18.199.1
81 60 0:52 / /kubelet/a rw,relatime shared:1 - nfs4 198.18.199.1:/vda-xfs/k8s/slabs/a/data rw,vers=4.2,addr=198.18.199.1
82 61 0:52 / /kubelet/b rw,relatime shared:1 - nfs4 198.18.199.1:/vda-xfs/k8s/slabs/b/data rw,vers=4.2,addr=198.18.199.1
83 60 0:52 / /pod/a rw,relatime shared:1 - nfs4 198.18.199.1:/vda-xfs/k8s/slabs/a/data rw,vers=4.2,addr=198.18.199.1
84 60 0:52 / /pod/part rw,relatime shared:1 - nfs4 198.18.199.1:/vda-xfs/k8s/slabs/a/data/sub\040path rw,vers=4.2,addr=198.18.199.1
85 60 0:53 / /six rw,relatime shared:1 - nfs [fe80::1]:/export rw,vers=3,addr=fe80::1
`
	got, err := parseMountInfo(text)
	if err != nil || len(got) != 6 {
		t.Fatalf("%v %v", got, err)
	}
	staged := got[1]
	for i, is := range []struct{ same, part bool }{{}, {same: true}, {}, {same: true}, {part: true}, {}} {
		if m := got[i]; m.SameTree(staged) != is.same || m.PartOf(staged) != is.part {
			t.Errorf("%s shows the staged tree: %t, a part of it: %t", m.Point, m.SameTree(staged), m.PartOf(staged))
		}
	}
	if root := got[5].Root; root != "/export" {
		t.Errorf("an export at an IPv6 address shows %q", root)
	}
}

func TestAPartLiesBelowAndNotBeside(t *testing.T) {
	at := func(root string) Mount { return Mount{Major: 8, Minor: 1, Root: root} }
	for _, c := range []struct {
		part, whole string
		want        bool
	}{
		{"/slabs/v/data/sub", "/slabs/v/data", true},
		{"/slabs/v/data/sub/f", "/slabs/v/data", true},
		{"/slabs/v/data/sub//deleted", "/slabs/v/data", true},
		{"/slabs/v/data/sub//deleted", "/slabs/v/data//deleted", true},
		{"/sub", "/", true},
		{"/slabs/v/data", "/slabs/v/data", false},
		{"/slabs/v/data2", "/slabs/v/data", false},
		{"/slabs/v/data2/sub", "/slabs/v/data", false},
		{"/slabs/v/data//deleted", "/slabs/v/data", false}, // another directory of that name
		{"/slabs/v", "/slabs/v/data", false},
		{"/", "/", false},
	} {
		if got := at(c.part).PartOf(at(c.whole)); got != c.want {
			t.Errorf("%s is part of %s: %t", c.part, c.whole, got)
		}
	}
	if other := (Mount{Major: 8, Minor: 2, Root: "/slabs/v/data/sub"}); other.PartOf(at("/slabs/v/data")) {
		t.Error("of another filesystem")
	}
}

func TestProbeOutput(t *testing.T) {
	// blkid of util-linux 2.38.1.
	s := parseProbe("DEVNAME=/dev/loop0\nUUID=7d3cbc46-8ae7-4b4b-a5cf-0c0f1a4a0f0b\nVERSION=1.0\nBLOCK_SIZE=4096\nTYPE=ext4\nUSAGE=filesystem\n")
	if s.Type != "ext4" || s.UUID != "7d3cbc46-8ae7-4b4b-a5cf-0c0f1a4a0f0b" || s.Empty() {
		t.Errorf("%+v", s)
	}
	if s := parseProbe("DEVNAME=/dev/loop0\nPTUUID=1234\nPTTYPE=dos\n"); s.Empty() || s.String() != "a dos partition table" {
		t.Errorf("%+v", s)
	}
}

// answers is a Runner that gives one answer and remembers what was run.
type answers struct {
	res Result
	ran []Command
}

func (a *answers) Run(_ context.Context, c Command) (Result, error) {
	a.ran = append(a.ran, c)
	if a.res.ExitCode != 0 {
		return a.res, &ExitError{Command: c, Result: a.res}
	}
	return a.res, nil
}

func TestCheckFollowsTheKubeletsPolicy(t *testing.T) {
	for code, want := range map[int]struct {
		kind fault.Kind
		fail bool
		note bool
	}{0: {}, 1: {note: true}, 4: {kind: fault.Corrupt, fail: true}, 5: {kind: fault.Corrupt, fail: true}, 8: {note: true}, 16: {note: true}} {
		l := NewLocal(&answers{res: Result{ExitCode: code, Stdout: []byte("said")}})
		note, err := l.Check(context.Background(), "/dev/x", Ext4)
		if (err != nil) != want.fail || (note != "") != want.note || err != nil && !errors.Is(err, want.kind) {
			t.Errorf("status %d: %q %v", code, note, err)
		}
	}
}

func TestProbeTellsNothingFromAmbivalent(t *testing.T) {
	dev := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(dev, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	for code, want := range map[int]Signature{2: {}, 8: {Ambivalent: true}} {
		s, err := NewLocal(&answers{res: Result{ExitCode: code}}).Probe(ctx, dev)
		if err != nil || s != want {
			t.Errorf("status %d: %+v %v", code, s, err)
		}
	}
	if s, err := NewLocal(&answers{res: Result{ExitCode: 4}}).Probe(ctx, dev); err == nil {
		t.Errorf("a usage error was taken for %+v", s)
	}
	if _, err := NewLocal(&answers{res: Result{ExitCode: 2}}).Probe(ctx, dev+"-absent"); !errors.Is(err, fault.NotFound) {
		t.Errorf("a device that is not there: %v", err)
	}
}

func TestMissingProgramNamesItsPackage(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := Exec{}.Run(context.Background(), Command{Name: "mkfs.xfs"})
	if !errors.Is(err, fault.Unsupported) || !contains(err, "mkfs.xfs") || !contains(err, "xfsprogs") {
		t.Error(err)
	}
	if _, err := NewLocal(Exec{}).Freeze(context.Background(), "/", time.Second); !errors.Is(err, fault.Unsupported) {
		t.Errorf("froze without a watchdog: %v", err)
	}
}

func contains(err error, word string) bool {
	for s := err.Error(); len(s) >= len(word); s = s[1:] {
		if s[:len(word)] == word {
			return true
		}
	}
	return false
}

func TestGuardLeavesBehindWhatHangs(t *testing.T) {
	var g Guard
	ctx := context.Background()
	release, entered := make(chan struct{}), make(chan struct{})
	err := g.Do(ctx, "x", time.Millisecond, func() error { close(entered); <-release; return nil })
	<-entered
	if !errors.Is(err, fault.Unavailable) || g.Abandoned() != 1 {
		t.Fatalf("%v, %d abandoned", err, g.Abandoned())
	}
	if err := g.Do(ctx, "x", time.Minute, func() error { t.Error("tried again"); return nil }); !errors.Is(err, fault.Unavailable) {
		t.Fatal(err)
	}
	if err := g.Do(ctx, "y", time.Minute, func() error { return nil }); err != nil {
		t.Fatalf("another object: %v", err)
	}
	close(release)
	deadline := time.After(time.Minute)
	for g.Abandoned() != 0 {
		select {
		case <-deadline:
			t.Fatal("what came back is still counted")
		case <-time.After(time.Millisecond):
		}
	}
	if err := g.Do(ctx, "x", time.Minute, func() error { return nil }); err != nil {
		t.Fatal(err)
	}
}

func TestBtrfsGetsItsOwnIDOnOldKernels(t *testing.T) {
	ctx := context.Background()
	const id = "7d3cbc46-8ae7-4b4b-a5cf-0c0f1a4a0f0b"
	sysfs := t.TempDir()
	dev := filepath.Join(t.TempDir(), "dev")
	image := make([]byte, 128<<10)
	copy(image[65536+0x40:], "_BHRfS_M")
	write := func() {
		if err := os.WriteFile(dev, image, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write()
	run := &answers{}
	l := NewLocal(run)
	if err := l.separateBtrfs(ctx, sysfs, dev, id, false); err != nil || len(run.ran) != 0 {
		t.Fatalf("no relative is mounted: %v %v", run.ran, err)
	}
	if err := os.Mkdir(filepath.Join(sysfs, id), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := l.separateBtrfs(ctx, sysfs, dev, id, true); !errors.Is(err, fault.Unsupported) || !contains(err, "6.7") {
		t.Fatalf("read-only: %v", err)
	}
	if err := l.separateBtrfs(ctx, sysfs, dev, id, false); err != nil || len(run.ran) != 1 || run.ran[0].Name != "btrfstune" {
		t.Fatalf("%v %v", run.ran, err)
	}
	image[65536+0x60] = 1 // a log tree
	write()
	if err := l.separateBtrfs(ctx, sysfs, dev, id, false); !errors.Is(err, fault.Unsupported) || !contains(err, "log") {
		t.Fatalf("with a log: %v", err)
	}
	if err := os.MkdirAll(filepath.Join(sysfs, "features/temp_fsid"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := l.separateBtrfs(ctx, sysfs, dev, id, true); err != nil {
		t.Fatalf("on a new kernel: %v", err)
	}
}
