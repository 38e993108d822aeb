package python

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/remote"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/test/process"
)

const checkout = "../.."

// python is Debian's, which has Debian's grpcio.
const python = "/usr/bin/python3"

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it did not happen: " + what)
		}
	}
}

// shortDir is for sockets, whose paths may have 107 bytes only.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "q-")
	ok(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func needRoot(t *testing.T, what string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip(what + " needs root")
	}
}

// commands of a section of docs/ENGINES.md.
func commands(t *testing.T, section string) string {
	t.Helper()
	page, err := os.ReadFile(checkout + "/docs/ENGINES.md")
	ok(t, err)
	_, text, found := strings.Cut(string(page), "\n## "+section+"\n")
	if !found {
		t.Fatalf("docs/ENGINES.md has no section %q any more", section)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	var out strings.Builder
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(text, -1) {
		out.WriteString(block[1])
	}
	return out.String()
}

// TestTheCommandsOfTheEnginesPage lead where it says: a conforming engine, a broken one, and a domain.
// The packages are there already, and the programs were built in the same way.
func TestTheCommandsOfTheEnginesPage(t *testing.T) {
	needRoot(t, "quarry standalone")
	dir := shortDir(t)
	ok(t, os.Mkdir(dir+"/bin", 0o755))
	ok(t, process.Build(dir+"/bin", "quarry", "kubectl-quarry"))
	for _, name := range []string{"docs", "pkg"} {
		at, err := filepath.Abs(filepath.Join(checkout, name))
		ok(t, err)
		ok(t, os.Symlink(at, filepath.Join(dir, name)))
	}
	script := commands(t, "An engine in another language")
	for _, elsewhere := range []string{"apt-get install", "make build"} {
		if !strings.Contains(script, "\n"+elsewhere) && !strings.HasPrefix(script, elsewhere) {
			t.Errorf("%q is not on the page any more", elsewhere)
		}
	}
	// What the page leaves running when a command fails must not stay.
	const before = "trap 'kill $(jobs -p) 2>/dev/null || :' EXIT\napt-get() { :; }\nmake() { :; }\nset -eu\n"
	cmd := exec.CommandContext(t.Context(), "bash", "-c", before+script)
	cmd.Dir, cmd.WaitDelay = dir, 10*time.Second
	var said, log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &log
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s\n%s", err, said.String(), log.String())
	}
	kept := regexp.MustCompile(`(\d+) of (\d+) rules kept\.`).FindAllStringSubmatch(said.String(), -1)
	page, err := os.ReadFile(checkout + "/docs/ENGINES.md")
	ok(t, err)
	if len(kept) != 2 || kept[0][1] != kept[0][2] || kept[1][1] == kept[1][2] || !strings.Contains(string(page), "`"+kept[0][0]+"`") {
		t.Errorf("the page says otherwise: %q", kept)
	}
	broken := regexp.MustCompile(`(?m)^FAIL +native +(.+?)  `).FindAllStringSubmatch(said.String(), -1)
	var names []string
	for _, b := range broken {
		names = append(names, b[1])
	}
	if !slices.Contains(names, "tag is exclusive") || len(names) != 5 {
		t.Errorf("the broken rules are %q", names)
	}
	if !strings.Contains(said.String(), "\nstatus 2\n") {
		t.Error("a broken engine does not give status 2")
	}
	if !regexp.MustCompile(`(?m)^python +python\.[0-9a-f]{8} +socket +Open `).MatchString(said.String()) {
		t.Error("the domain is not open")
	}
	if t.Failed() {
		t.Logf("%s\n%s", said.String(), log.String())
	}
}

// reference is the engine's process.
type reference struct {
	t      *testing.T
	dir    string // with engine.py
	socket string
	cmd    *exec.Cmd
	log    bytes.Buffer
}

func newReference(t *testing.T) *reference {
	t.Helper()
	r := &reference{t: t, dir: shortDir(t)}
	r.socket = r.dir + "/s"
	text, err := os.ReadFile(checkout + "/docs/examples/engine-python/engine.py")
	ok(t, err)
	ok(t, os.WriteFile(r.dir+"/engine.py", text, 0o644))
	if out, err := exec.Command("protoc", "-I", checkout+"/pkg/engine/enginepb", "--python_out="+r.dir, "engine.proto").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() {
		r.kill()
		if t.Failed() {
			t.Logf("%s", r.log.String())
		}
	})
	r.start()
	return r
}

func (r *reference) start() {
	r.t.Helper()
	r.cmd = exec.Command(python, r.dir+"/engine.py", "--socket", r.socket)
	r.cmd.Stderr = &r.log
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	ok(r.t, r.cmd.Start())
}

func (r *reference) kill() {
	_ = r.cmd.Process.Kill()
	_ = r.cmd.Wait() // it was killed
}

// open opens a domain; the engine may just be starting.
func (r *reference) open(path string) *remote.Engine {
	r.t.Helper()
	var e *remote.Engine
	eventually(r.t, "the engine answers", func() (done bool) {
		var err error
		e, err = remote.Open(r.t.Context(), remote.Config{Dial: remote.Socket(r.socket), Client: "test", Params: map[string]string{"path": path}})
		if err != nil && !errors.Is(err, fault.Unavailable) {
			r.t.Fatal(err)
		}
		return err == nil
	})
	r.t.Cleanup(func() { _ = e.Close() })
	return e
}

// TestAFullDiskIsExhaustedAndDeletingWorks: that promises that nothing remains, and needs a tag.
func TestAFullDiskIsExhaustedAndDeletingWorks(t *testing.T) {
	needRoot(t, "a small file system")
	r := newReference(t)
	disk := t.TempDir()
	ok(t, unix.Mount("tmpfs", disk, "tmpfs", 0, "size=3m"))
	t.Cleanup(func() { ok(t, unix.Unmount(disk, unix.MNT_DETACH)) })
	e := r.open(disk)
	ctx := t.Context()
	ok(t, e.CreateSlab(ctx, engine.SlabSpec{ID: "a", Kind: engine.Block, Size: 16 << 20}))
	a, err := e.AttachSlab(ctx, "a", engine.AttachOptions{})
	ok(t, err)
	f, err := os.OpenFile(a.Path, os.O_WRONLY, 0)
	ok(t, err)
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	ok(t, f.Close())

	var made []string
	for err = nil; err == nil; {
		name := fmt.Sprintf("t.%d", len(made))
		if err = e.CreateTag(ctx, engine.Tag{Name: name, Slab: "a", Record: make([]byte, 100)}); err == nil {
			made = append(made, name)
		}
	}
	if !errors.Is(err, fault.Exhausted) || len(made) == 0 {
		t.Fatalf("%v (%v) after %d tags: want %v, and room for some", err, fault.KindOf(err), len(made), fault.Exhausted)
	}
	if err := e.CreateSlab(ctx, engine.SlabSpec{ID: "b", Kind: engine.Tree, Size: 1}); !errors.Is(err, fault.Exhausted) {
		t.Errorf("a tree on a full disk: %v (%v)", err, fault.KindOf(err))
	}
	tags, err := e.ListTags(ctx, "")
	ok(t, err)
	slabs, err := e.ListSlabs(ctx)
	ok(t, err)
	if len(tags) != len(made) || len(slabs) != 1 {
		t.Errorf("%d tags were made, %d are there; slabs %v", len(made), len(tags), slabs)
	}
	ok(t, e.DeleteSlab(ctx, "a"))
	ok(t, e.CreateTag(ctx, engine.Tag{Name: "after"}))
	if reserve, err := os.ReadDir(disk + "/reserve"); err != nil || len(reserve) != 16 {
		t.Errorf("the reserve was not made again: %d files, %v", len(reserve), err)
	}
}

// TestWhatWasAnsweredIsThereAfterAKill, what was not is whole or not there, and nothing is left over.
func TestWhatWasAnsweredIsThereAfterAKill(t *testing.T) {
	r := newReference(t)
	storage := t.TempDir()
	var answered, deleted sync.Map
	for round := range 5 {
		e := r.open(storage)
		var all sync.WaitGroup
		var done sync.WaitGroup
		done.Add(20) // answers before the kill
		for w := range 4 {
			all.Go(func() {
				for i := 0; ; i++ {
					name := fmt.Sprintf("r%d.w%d.%d", round, w, i)
					kind := []engine.Kind{engine.Block, engine.Tree}[i%2]
					err := e.CreateTag(t.Context(), engine.Tag{Name: name, Slab: name, Record: []byte("record of " + name)})
					if err == nil {
						err = e.CreateSlab(t.Context(), engine.SlabSpec{ID: name, Kind: kind, Size: 1 << 20})
					}
					if err == nil {
						answered.Store(name, true)
					}
					if err == nil && i%3 == 2 {
						answered.Delete(name)
						if err = e.DeleteSlab(t.Context(), name); err == nil {
							deleted.Store(name, true)
						}
					}
					if err != nil {
						if !errors.Is(err, fault.Unavailable) {
							t.Errorf("%s: %v", name, err)
						}
						for ; i < 5; i++ {
							done.Done()
						}
						return
					}
					if i < 5 {
						done.Done()
					}
				}
			})
		}
		done.Wait()
		r.kill()
		all.Wait()
		r.start()
	}
	e := r.open(storage)
	tags, err := e.ListTags(t.Context(), "")
	ok(t, err)
	have := map[string]bool{}
	for _, tag := range tags {
		have[tag.Name] = true
		if tag.Slab != tag.Name || string(tag.Record) != "record of "+tag.Name {
			t.Errorf("tag %q is half made: %q %q", tag.Name, tag.Slab, tag.Record)
		}
	}
	slabs, err := e.ListSlabs(t.Context())
	ok(t, err)
	there := map[string]bool{}
	for _, slab := range slabs {
		there[slab.ID] = true
		if slab.Size != 1<<20 {
			t.Errorf("slab %+v is half made", slab)
		}
		if _, err := e.AttachSlab(t.Context(), slab.ID, engine.AttachOptions{}); err != nil {
			t.Errorf("slab %q: %v", slab.ID, err)
		}
	}
	n := 0
	answered.Range(func(name, _ any) bool {
		n++
		if !have[name.(string)] || !there[name.(string)] {
			t.Errorf("%s was answered and is gone: tag %v, slab %v", name, have[name.(string)], there[name.(string)])
		}
		return true
	})
	deleted.Range(func(name, _ any) bool {
		if there[name.(string)] {
			t.Errorf("%s was deleted and is there", name)
		}
		return true
	})
	if n < 5*4*3 {
		t.Errorf("only %d were answered", n)
	}
	// What a crash left over goes some time later, when the domain is opened.
	left, err := os.ReadDir(storage + "/tmp")
	ok(t, err)
	long := time.Now().Add(-time.Hour)
	for _, l := range left {
		ok(t, os.Chtimes(filepath.Join(storage, "tmp", l.Name()), long, long))
	}
	r.kill()
	r.start()
	r.open(storage)
	if left, err = os.ReadDir(storage + "/tmp"); err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

// TestQuarryUsesIt: volumes, snapshots and clones in a domain of an engine that Quarry does not
// know, which dies under them.
func TestQuarryUsesIt(t *testing.T) {
	needRoot(t, "quarry standalone")
	r := newReference(t)
	dir, storage := shortDir(t), t.TempDir()
	ok(t, process.Build(dir, "quarry"))
	q, err := process.New(process.Config{Binary: dir + "/quarry", Dir: dir, Node: "n1", Installation: "test",
		Domains: process.DomainsFile(fmt.Sprintf("- name: python\n  socket: %s\n  engine: python-dir\n  params: {path: %s}\n", r.socket, storage))})
	ok(t, err)
	t.Cleanup(func() { ok(t, q.Close()) })
	ok(t, q.Start(t.Context()))
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(q.LastLog(50))
		}
		ok(t, q.Kill())
	})
	again := func(what string, call func(ctx context.Context) error) {
		t.Helper()
		eventually(t, what, func() bool {
			err := call(t.Context())
			if c := status.Code(err); err != nil && c != codes.Unavailable && c != codes.Aborted {
				t.Fatalf("%s: %v", what, err)
			}
			return err == nil
		})
	}
	writer := &csi.VolumeCapability{AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER}}
	create := func(name string, source *csi.VolumeContentSource) (id string) {
		t.Helper()
		again(name, func(ctx context.Context) error {
			v, err := q.CreateVolume(ctx, &csi.CreateVolumeRequest{Name: name, VolumeCapabilities: []*csi.VolumeCapability{writer},
				CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 20}, VolumeContentSource: source})
			id = v.GetVolume().GetVolumeId()
			return err
		})
		return id
	}
	volume := create("volume", nil)
	slabs, err := filepath.Glob(storage + "/slabs/*")
	ok(t, err)
	if len(slabs) != 1 {
		t.Fatalf("slabs %v", slabs)
	}
	content := bytes.Repeat([]byte("quarry"), 10000)
	f, err := os.OpenFile(slabs[0], os.O_WRONLY, 0)
	ok(t, err)
	_, err = f.WriteAt(content, 4096)
	ok(t, errors.Join(err, f.Close()))

	var snapshot string
	again("snapshot", func(ctx context.Context) error {
		s, err := q.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "snapshot", SourceVolumeId: volume})
		snapshot = s.GetSnapshot().GetSnapshotId()
		if err == nil && !s.GetSnapshot().GetReadyToUse() {
			return status.Error(codes.Aborted, "not ready yet")
		}
		return err
	})
	r.kill()
	if _, err := q.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: "clone", VolumeCapabilities: []*csi.VolumeCapability{writer},
		CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 20}}); status.Code(err) != codes.Unavailable {
		t.Errorf("while the engine is away: %v", err)
	}
	r.start()
	clone := create("clone of the snapshot", &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}})
	found := 0
	all, err := filepath.Glob(storage + "/slabs/*")
	ok(t, err)
	for _, path := range all {
		data, err := os.ReadFile(path)
		ok(t, err)
		if len(data) >= 4096+len(content) && bytes.Equal(data[4096:4096+len(content)], content) {
			found++
		}
	}
	if found < 2 {
		t.Errorf("the content is in %d of %d slabs: want that of the volume and that of its copy", found, len(all))
	}
	for _, id := range []string{volume, clone} {
		again("deletion", func(ctx context.Context) error {
			_, err := q.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
			return err
		})
	}
	again("deletion", func(ctx context.Context) error {
		_, err := q.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: snapshot})
		return err
	})
}
