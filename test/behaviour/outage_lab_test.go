package behaviour

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/test/gluster"
	"github.com/quarry-csi/quarry/test/lab"
	"github.com/quarry-csi/quarry/test/lab/samba"
)

// far is a domain behind a server that can be taken away.
type far struct {
	place
	outages []outage
	// left are the files of slabs, of what is half done and of what waits for its removal.
	left func(t *testing.T) []string
	disk string // the server's file system, which can be filled; "": not here
}

// outage is something that befalls a server, or the way to it.
type outage struct {
	name string
	// befall begins it, and returns what ends it.
	befall func(t testing.TB) (over func())
	// lasts as long; 0: it is over at once, and nobody has to go on meanwhile.
	lasts time.Duration
	// breaks: writes fail, rather than wait, and the volume is to be staged anew.
	breaks bool
}

func farNFS(t *testing.T, engine string) far {
	server := lab.StartNFS(t)
	x := server.Export(t, "xfs")
	export := x.Dir
	if engine == "nfs4" {
		export = x.V4
	}
	stopped := func(t testing.TB) func() { server.Stop(t); return func() { server.Start(t) } }
	return far{place: place{name: "far", entry: fmt.Sprintf("- name: far\n  engine: %s\n  scope: node\n  params: {server: 127.0.0.1, export: %s, folder: k8s}\n", engine, export)},
		outages: []outage{
			{name: "the server restarts", befall: stopped},
			{name: "the connection is cut", befall: server.Cut, lasts: 50 * time.Second},
			{name: "the server is stopped", befall: stopped, lasts: time.Minute},
		},
		left: leftIn(filepath.Join(x.Dir, "k8s")), disk: x.Dir}
}

func leftIn(folder string) func(t *testing.T) []string {
	return func(t *testing.T) []string { return content(t, place{path: folder}, "slabs", "tmp", "trash") }
}

func farSMB(t *testing.T) far {
	lab.Need(t)
	disk := hosttest.Filesystem(t, "xfs", 2<<30)
	shared, secrets := filepath.Join(disk, "shared"), filepath.Join(t.TempDir(), "secrets.yaml")
	if err := errors.Join(os.Mkdir(shared, 0o755),
		os.WriteFile(secrets, fmt.Appendf(nil, "username: %s\npassword: '%s'\n", samba.User, samba.YAMLPassword()), 0o600)); err != nil {
		t.Fatal(err)
	}
	server := samba.Start(t, nil, samba.Share{Name: "k8s", Path: shared})
	killed := func(t testing.TB) func() { server.Kill(); return func() { server.Run(t) } }
	return far{place: place{name: "far", entry: fmt.Sprintf("- name: far\n  engine: smb\n  scope: node\n  params: {server: %q, share: k8s}\n  secretsFile: %s\n", server.Address(), secrets)},
		outages: []outage{
			{name: "the server restarts", befall: killed},
			{name: "the connection is cut", befall: server.Cut, lasts: 50 * time.Second},
			{name: "the server is stopped", befall: killed, lasts: time.Minute},
			{name: "the server stands still", befall: func(t testing.TB) func() { server.Freeze(t); return func() { server.Thaw(t) } }, lasts: time.Minute},
		},
		left: leftIn(shared), disk: disk}
}

// farGluster has two copies of everything. Its client makes writes fail that no brick takes.
func farGluster(t *testing.T) far {
	g := gluster.Start(t).Volume(t, gluster.VolumeSpec{Name: "vol"})
	killed := func(bricks ...int) func(t testing.TB) func() {
		return func(t testing.TB) func() {
			for _, i := range bricks {
				g.Kill(t, i)
			}
			return func() { g.Restart(t); g.Healed(t) }
		}
	}
	return far{place: place{name: "far", entry: fmt.Sprintf("- name: far\n  engine: gluster\n  params: {servers: %s, volume: vol, folder: k8s}\n", g.Server.Address)},
		outages: []outage{
			{name: "one brick is killed", befall: killed(1), lasts: 20 * time.Second},
			{name: "the server stands still", befall: func(t testing.TB) func() { g.Server.Pause(t); return func() { g.Server.Resume(t) } }, lasts: 25 * time.Second},
			{name: "all bricks are killed", befall: killed(0, 1), lasts: 20 * time.Second, breaks: true},
			{name: "the connection is cut", befall: func(t testing.TB) func() { g.Server.Unplug(t); return func() { g.Server.Plug(t) } }, lasts: time.Minute, breaks: true},
		},
		left: func(t *testing.T) []string {
			return strings.Fields(g.Run(t, "sh", "-c", fmt.Sprintf("cd %s/k8s && find slabs tmp trash -mindepth 1", g.Brick(0))))
		}}
}

func TestLabOutagesUnderLoadNFS3(t *testing.T) { outages(t, farNFS(t, "nfs3")) }
func TestLabOutagesUnderLoadNFS4(t *testing.T) { outages(t, farNFS(t, "nfs4")) }
func TestLabOutagesUnderLoadSMB(t *testing.T)  { outages(t, farSMB(t)) }

// TestLabOutagesUnderLoadGluster needs no lab, but some minutes.
func TestLabOutagesUnderLoadGluster(t *testing.T) {
	if !lab.Inside() && os.Getenv("QUARRY_GLUSTER") != "long" {
		t.Skip("takes minutes: QUARRY_GLUSTER=long, or the lab")
	}
	outages(t, farGluster(t))
}

// outages lets everything befall a domain whose volume fio and a journal write, with a domain beside it. Nothing that
// was acknowledged is lost, nothing is left over, and the other domain goes on.
func outages(t *testing.T, f far) {
	r := newRig(t, f.place, on(t, "near", "ext4", 1<<30))
	all := append([]outage{{name: "quarry is killed", befall: func(testing.TB) func() { r.kill(); return r.start }}}, f.outages...)
	for _, o := range all {
		t.Run(o.name, func(t *testing.T) { r.t = t; f.meet(t, r, o) })
	}
	t.Run("snapshots under load", func(t *testing.T) { r.t = t; f.snapshots(t, r) })
	if f.disk != "" {
		t.Run("the server's disk is full", func(t *testing.T) { r.t = t; f.full(t, r) })
	}
	r.t = t
	r.stop()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), "/run/quarry/mounts/") {
		t.Errorf("mounts are left:\n%s", text)
	}
}

func (f far) meet(t *testing.T, r *rig, o outage) {
	v := r.volume(f.name, strings.ReplaceAll(o.name, " ", "-"), 64*mib, filesystem("ext4")).mount()
	w, load, others := startWriter(t, v.target), startRounds(t, v.target), startLives(r, "near")
	w.goesOn(r)
	load.goOn(r)
	before := others.count.Load()
	over := sync.OnceFunc(o.befall(t))
	t.Cleanup(over) // of a test that has failed meanwhile
	time.Sleep(o.lasts)
	meanwhile := others.count.Load() - before
	if o.lasts > 0 && meanwhile == 0 {
		t.Errorf("no volume of the other domain was made, used and deleted in %s", o.lasts)
	}
	over()
	resumed := time.Now()
	since := func() time.Duration { return time.Since(resumed).Round(10 * time.Millisecond) }
	if !o.breaks {
		w.goesOn(r)
		t.Logf("writes went on after %s", since())
	}
	r.volume(f.name, v.name+"-new", 16*mib, filesystem("ext4")).remove()
	t.Logf("a volume was made and deleted after %s", since())
	if o.breaks {
		t.Logf("the writers ended with: %v; %v", w.failed(), load.failed())
	} else {
		load.goOn(r)
		load.end(t)
		w.end(t)
	}
	slowest := others.end(t)
	t.Logf("meanwhile %d volumes lived in the other domain, the slowest of all for %s; %d entries are durable", meanwhile, slowest.Round(10*time.Millisecond), w.synced.Load())
	v.unmount()
	v.mount() // from the storage
	t.Logf("staged anew after %s", since())
	verifyCut(t, v.target, w.synced.Load())
	if !o.breaks {
		load.verify(t, v.target)
	}
	writeFile(t, filepath.Join(v.target, "proof"), []byte("it takes writes"))
	v.unmount()
	v.remove()
	f.nothingIsLeft(r, v)
}

// snapshots takes some while fio and a journal write, and restores each: by layers, where the storage has no better way.
// A layer on a share that is made in the wrong way destroys memory of the node: its kernel says so, or dies.
func (f far) snapshots(t *testing.T, r *rig) {
	tainted := kernelTaint(t)
	v := r.volume(f.name, "source", 64*mib, filesystem("ext4")).mount()
	w, load := startWriter(t, v.target), startRounds(t, v.target)
	for i := range 3 {
		w.goesOn(r)
		durable := w.synced.Load()
		snapshot := r.snapshot(v, fmt.Sprint("snapshot-", i))
		w.goesOn(r)
		restored := r.copyOf(fromSnapshot(snapshot), f.name, fmt.Sprint("restored-", i), 64*mib, filesystem("ext4")).mount()
		verifyCut(t, restored.target, durable)
		restored.unmount()
		restored.remove()
		r.removeSnapshot(snapshot) // what it was made of is merged below the load
	}
	load.goOn(r)
	load.end(t)
	w.end(t)
	v.unmount()
	v.mount()
	verifyCut(t, v.target, w.synced.Load())
	load.verify(t, v.target)
	v.unmount()
	v.remove()
	f.nothingIsLeft(r, v)
	if now := kernelTaint(t); now != tainted {
		t.Errorf("the kernel is tainted: %s, before %s", now, tainted)
	}
}

func kernelTaint(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/kernel/tainted")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// full lets the server's disk be full: a write that finds no space fails, and is not acknowledged. What was, is there when
// there is space again; deleting needs none.
func (f far) full(t *testing.T, r *rig) {
	v, doomed := r.volume(f.name, "full", 64*mib, filesystem("ext4")).mount(), r.volume(f.name, "doomed", 16*mib, rawBlock())
	w, others := startWriter(t, v.target), startLives(r, "near")
	w.goesOn(r)
	free := sync.OnceFunc(fillUp(t, place{path: f.disk}, 0))
	t.Cleanup(free)
	before := others.count.Load()
	time.Sleep(time.Minute)
	_, err := call(r, r.CreateVolume, creation(f.name, "no-room", 32*mib, rawBlock()))
	t.Logf("a new volume: %v", err)
	if c := status.Code(err); c != codes.OK && c != codes.ResourceExhausted { // there may be room for a sparse file
		t.Errorf("a new volume on a full server: %v", err)
	}
	doomed.remove()
	r.eventually("the deleted slab to be gone", func() error {
		for _, file := range f.left(t) {
			if strings.Contains(file, doomed.image()) {
				return errors.New(file)
			}
		}
		return nil
	})
	if others.count.Load() == before {
		t.Error("no volume of the other domain was made, used and deleted meanwhile")
	}
	meanwhile := others.count.Load() - before
	free()
	resumed := time.Now()
	made := r.volume(f.name, "no-room", 32*mib, rawBlock())
	t.Logf("a volume is made %s after there is space again", time.Since(resumed).Round(10*time.Millisecond))
	slowest := others.end(t)
	t.Logf("the writer ended with: %v", w.failed())
	v.unmount()
	v.mount()
	verifyCut(t, v.target, w.synced.Load())
	writeFile(t, filepath.Join(v.target, "proof"), []byte("it takes writes again"))
	t.Logf("meanwhile %d volumes lived in the other domain, the slowest of all for %s; all of %d entries are there", meanwhile, slowest.Round(10*time.Millisecond), w.synced.Load())
	v.unmount()
	v.remove()
	made.remove()
	f.nothingIsLeft(r, v, made)
}

// failed ends a writer whose writes may have failed, and says why.
func (w *writer) failed() error {
	close(w.stop)
	return <-w.ended
}

// nothingIsLeft: no image, no slab, no device and no mount, once the collector was there. The last tags of what was
// deleted follow some ten minutes later.
func (f far) nothingIsLeft(r *rig, of ...*volume) {
	r.t.Helper()
	r.eventually("all to be gone", func() error {
		if err := slabsGone(r); err != nil {
			return err
		}
		if left := f.left(r.t); len(left) > 0 {
			return fmt.Errorf("files %q", left)
		}
		if left := slabLoops(r.t, of); len(left) > 0 {
			return fmt.Errorf("loop devices %v", left)
		}
		if left := mapped(r.t); len(left) > 0 {
			return fmt.Errorf("devices %q", left)
		}
		return nil
	})
	if left := r.mounts(); len(left) > 0 {
		r.t.Errorf("mounts %q are left", left)
	}
}

// mapped are Quarry's devices of the device-mapper.
func mapped(t *testing.T) (uuids []string) {
	t.Helper()
	files, err := filepath.Glob("/sys/block/dm-*/dm/uuid")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if text, err := os.ReadFile(file); err == nil && strings.HasPrefix(string(text), "QUARRY-") {
			uuids = append(uuids, strings.TrimSpace(string(text)))
		}
	}
	return uuids
}

// rounds of fio, each of which writes all of a file in random order, past the page cache, and verifies it.
type rounds struct {
	work    string        // where fio may leave something
	whole   atomic.Uint64 // so many have ended, all well
	stop    chan struct{}
	ended   chan error
	running atomic.Pointer[os.Process]
}

func startRounds(t *testing.T, dir string) *rounds {
	t.Helper()
	l := &rounds{work: t.TempDir(), stop: make(chan struct{}), ended: make(chan error, 1)}
	t.Cleanup(func() {
		if p := l.running.Load(); p != nil {
			_ = p.Kill() // it has ended, unless the test has failed
		}
	})
	go func() {
		for {
			select {
			case <-l.stop:
				l.ended <- nil
				return
			default:
			}
			if err := l.fio(dir, l.whole.Load()+1); err != nil {
				l.ended <- err
				return
			}
			l.whole.Add(1)
		}
	}()
	return l
}

func (l *rounds) fio(dir string, round uint64, more ...string) error {
	args := append([]string{"--name=load", "--filename=" + filepath.Join(dir, "fio"), "--size=2m", "--bs=16k", "--rw=randwrite",
		"--ioengine=psync", "--direct=1", "--fsync=16", "--rate_iops=30", fmt.Sprintf("--randseed=%d", round),
		"--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_backlog=64", "--verify_dump=0", "--output-format=terse"}, more...)
	cmd := exec.Command("fio", args...)
	cmd.Dir = l.work
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	said := &strings.Builder{}
	cmd.Stdout, cmd.Stderr = said, said
	err := cmd.Start()
	if err == nil {
		l.running.Store(cmd.Process)
		err = cmd.Wait()
	}
	if err != nil {
		return fmt.Errorf("fio %q: %w\n%s", args, err, said)
	}
	return nil
}

// goOn waits until a round has begun and ended.
func (l *rounds) goOn(r *rig) {
	r.t.Helper()
	from := l.whole.Load()
	r.eventually("fio to go on", func() error {
		if n := l.whole.Load(); n < from+2 {
			return fmt.Errorf("%d rounds after %d", n, from)
		}
		return nil
	})
}

// end waits for the last round.
func (l *rounds) end(t *testing.T) {
	t.Helper()
	if err := l.failed(); err != nil {
		t.Error(err)
	}
}

// failed does so where it may have failed, and says why.
func (l *rounds) failed() error {
	close(l.stop)
	return <-l.ended
}

// verify reads what the last round has written.
func (l *rounds) verify(t *testing.T, dir string) {
	t.Helper()
	if err := l.fio(dir, l.whole.Load(), "--verify_only"); err != nil {
		t.Error(err)
	}
}

// lives are volumes of a domain, one after the other: made, staged, written, and deleted.
type lives struct {
	count   atomic.Int64
	slowest time.Duration
	stop    chan struct{}
	ended   chan error
}

func startLives(r *rig, domain string) *lives {
	l := &lives{stop: make(chan struct{}), ended: make(chan error, 1)}
	go func() {
		for {
			select {
			case <-l.stop:
				l.ended <- nil
				return
			default:
			}
			began := time.Now()
			if err := r.life(domain, fmt.Sprintf("%s-%d-%d", domain, began.Unix(), l.count.Load())); err != nil {
				l.ended <- err
				return
			}
			l.slowest = max(l.slowest, time.Since(began))
			l.count.Add(1)
		}
	}()
	return l
}

// end returns how long the slowest life was.
func (l *lives) end(t *testing.T) time.Duration {
	t.Helper()
	close(l.stop)
	if err := <-l.ended; err != nil {
		t.Errorf("a volume of the other domain: %v", err)
	}
	return l.slowest
}

func (r *rig) life(domain, name string) error {
	made, err := call(r, r.CreateVolume, creation(domain, name, 16*mib, filesystem("ext4")))
	if err != nil {
		return err
	}
	v := &volume{r: r, id: made.GetVolume().GetVolumeId(), name: name, cap: filesystem("ext4")}
	if err := v.stage(); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(v.staging, "file"))
	if err == nil {
		_, err = f.WriteString(name)
		err = errors.Join(err, f.Sync(), f.Close())
	}
	if err != nil {
		return err
	}
	if _, err := call(r, r.NodeUnstageVolume, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging}); err != nil {
		return err
	}
	if _, err := call(r, r.ControllerUnpublishVolume, &csi.ControllerUnpublishVolumeRequest{VolumeId: v.id, NodeId: nodeID}); err != nil {
		return err
	}
	_, err = call(r, r.DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: v.id})
	return err
}
