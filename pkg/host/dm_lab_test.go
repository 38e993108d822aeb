package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/test/lab"
)

// mapper is a test's devices, all over one disk.
type mapper struct {
	*Local
	t      *testing.T
	ctx    context.Context
	disk   string
	prefix string // of its names and, in capitals, of its UUIDs
	used   int64
}

func newMapper(t *testing.T) *mapper {
	lab.Need(t)
	m := &mapper{Local: NewLocal(Exec{}), t: t, ctx: context.Background(), prefix: "quarry-test-" + fmt.Sprint(os.Getpid())}
	m.disk = lab.Disk(t)
	m.must(m.DeviceMapper(m.ctx))
	t.Cleanup(func() {
		if _, err := m.ResumeLeft(m.ctx, m.uuid("")); err != nil {
			t.Error(err)
		}
		all, err := m.Mapped(m.ctx, m.uuid(""))
		if err != nil {
			t.Error(err)
		}
		all = lowerFirst(all)
		slices.Reverse(all)
		for _, d := range all {
			if err := m.RemoveMapped(m.ctx, d); err != nil {
				t.Error(err)
			}
		}
	})
	return m
}

func (m *mapper) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

func (m *mapper) uuid(name string) string { return strings.ToUpper(m.prefix) + "-" + name }
func (m *mapper) name(name string) string { return m.prefix + "-" + name }

// space is a linear table over a part of the disk that nothing else has.
func (m *mapper) space(size int64) []Target {
	m.used += size
	return []Target{{Length: size, Type: "linear", Params: fmt.Sprintf("%s %d", m.disk, (m.used-size)/sector)}}
}

func (m *mapper) create(name string, table []Target) Mapped {
	m.t.Helper()
	d, err := m.CreateMapped(m.ctx, m.name(name), m.uuid(name), false, table)
	m.must(err)
	return d
}

func (m *mapper) see(d Mapped) Mapped {
	m.t.Helper()
	now, err := m.MappedByUUID(m.ctx, d.UUID)
	m.must(err)
	if now == nil {
		m.t.Fatalf("%s is gone", d.Name)
	}
	return *now
}

// until waits for a condition.
func (m *mapper) until(what string, f func() bool) {
	m.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	patience := time.After(time.Minute)
	for !f() {
		select {
		case <-tick.C:
		case <-patience:
			m.t.Fatalf("waited for a minute until %s", what)
		}
	}
}

func over(d Mapped) []Target {
	return []Target{{Length: d.Size, Type: "linear", Params: d.Path + " 0"}}
}

func (m *mapper) write(d Mapped, at int64, fill byte, n int) {
	m.t.Helper()
	f, err := os.OpenFile(d.Path, os.O_RDWR, 0)
	m.must(err)
	defer f.Close()
	_, err = f.WriteAt(bytes.Repeat([]byte{fill}, n), at)
	m.must(err)
	m.must(f.Sync())
}

// reads says whether n bytes at a place all have a value, past the page cache.
func (m *mapper) reads(d Mapped, at int64, want byte, n int) {
	m.t.Helper()
	f, err := os.OpenFile(d.Path, os.O_RDONLY|unix.O_DIRECT, 0)
	m.must(err)
	defer f.Close()
	buf, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	m.must(err)
	defer unix.Munmap(buf)
	_, err = f.ReadAt(buf, at)
	m.must(err)
	if i := bytes.IndexFunc(buf, func(r rune) bool { return r != rune(want) }); i >= 0 {
		m.t.Fatalf("%s has %#x at %d, want %#x", d.Name, buf[i], at+int64(i), want)
	}
}

func (m *mapper) ext4(d Mapped) (point string) {
	m.t.Helper()
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", d.Path).CombinedOutput(); err != nil {
		m.t.Fatalf("%v: %s", err, out)
	}
	point = filepath.Join(m.t.TempDir(), "mnt")
	m.must(os.Mkdir(point, 0o755))
	m.must(m.MountFilesystem(m.ctx, d.Path, point, "ext4", nil))
	m.t.Cleanup(func() {
		if _, err := m.ResumeLeft(m.ctx, m.uuid("")); err != nil {
			m.t.Error(err)
		}
		if err := m.Unmount(m.ctx, point); err != nil {
			m.t.Error(err)
		}
	})
	return point
}

// writer writes a file durably, on a thread of its own, and tells which and how it ended.
func writer(file string) (thread int, done <-chan error) {
	tid, ended := make(chan int), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		tid <- unix.Gettid()
		f, err := os.Create(file)
		if err == nil {
			_, err = f.WriteString("x")
			err = errors.Join(err, f.Sync(), f.Close())
		}
		ended <- err
	}()
	return <-tid, ended
}

// blocked says whether a thread of this process sleeps in the kernel, uninterruptibly.
func blocked(thread int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/stat", thread))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return strings.HasPrefix(rest, "D")
}

func TestLayersAreBuiltAndMerged(t *testing.T) {
	m := newMapper(t)
	const size, store, n = 8 << 20, 16 << 20, 4096
	base, cow := m.create("base", m.space(size)), m.create("store", m.space(store))
	m.write(base, 0, 'a', n)
	m.write(base, n, 'a', n)
	snapshot := []Target{{Length: size, Type: "snapshot", Params: base.Path + " " + cow.Path + " PO 8"}}
	layer := m.create("layer", snapshot)
	if layer.Size != size || layer.Suspended || layer.Inactive || layer.ReadOnly || layer.Open != 0 || layer.Path != fmt.Sprintf("/dev/dm-%d", layer.Minor) {
		t.Fatalf("%+v", layer)
	}
	if again := m.create("layer", snapshot); again.Minor != layer.Minor {
		t.Fatalf("made twice: %+v", again)
	}
	top := m.create("top", over(layer))
	m.write(top, n, 'b', n)
	m.reads(top, 0, 'a', n)
	m.reads(top, n, 'b', n)
	m.reads(base, n, 'a', n)
	status, err := m.StatusMapped(m.ctx, layer)
	if err != nil || len(status) != 1 || status[0] != "24/32768 16" {
		t.Fatalf("state %q, %v", status, err)
	}

	merge := slices.Clone(snapshot)
	merge[0].Type = "snapshot-merge"
	m.must(m.SuspendMapped(m.ctx, layer, false))
	if !m.see(layer).Suspended {
		t.Fatal("not suspended")
	}
	m.must(m.LoadMapped(m.ctx, layer, false, merge))
	if now := m.see(layer); !now.Inactive || now.Targets[0].Type != "snapshot" {
		t.Fatalf("after a load: %+v", now)
	}
	m.must(m.ResumeMapped(m.ctx, layer))
	m.until("all is merged", func() bool {
		status, err := m.StatusMapped(m.ctx, layer)
		m.must(err)
		return status[0] == "16/32768 16"
	})
	m.reads(top, n, 'b', n)
	m.reads(base, n, 'b', n)
	m.must(m.LoadMapped(m.ctx, layer, false, over(base)))
	m.must(m.ResumeMapped(m.ctx, layer))
	if now := m.see(layer); now.Minor != layer.Minor || now.Targets[0].Type != "linear" || now.Inactive {
		t.Fatalf("after the merge: %+v", now)
	}
	m.reads(top, 0, 'a', n)
	m.reads(top, n, 'b', n)
	m.must(m.FlushDevice(m.ctx, top.Path))

	zero := m.create("zero", []Target{{Length: size, Type: "zero"}, {Start: size, Length: size, Type: "linear", Params: base.Path + " 0"}})
	m.reads(zero, 0, 0, n)
	m.reads(zero, size+n, 'b', n)
	if zero.Size != 2*size || len(zero.Targets) != 2 || zero.Targets[0].Params != "" {
		t.Fatalf("%+v", zero)
	}
}

func TestReadOnlyDevicesAre(t *testing.T) {
	m := newMapper(t)
	table := m.space(1 << 20)
	d, err := m.CreateMapped(m.ctx, m.name("ro"), m.uuid("ro"), true, table)
	m.must(err)
	if !d.ReadOnly {
		t.Fatalf("%+v", d)
	}
	f, err := os.OpenFile(d.Path, os.O_RDWR, 0) // device-mapper allows that
	m.must(err)
	defer f.Close()
	if _, err := f.Write(make([]byte, sector)); !errors.Is(err, unix.EPERM) {
		t.Fatalf("written: %v", err)
	}
	if _, err := m.CreateMapped(m.ctx, d.Name, d.UUID, false, table); !errors.Is(err, fault.Conflict) {
		t.Fatalf("writable now: %v", err)
	}
}

func TestASuspendFreezesTheFilesystem(t *testing.T) {
	m := newMapper(t)
	lower := m.create("lower", m.space(64<<20))
	top := m.create("top", over(lower))
	point := m.ext4(top)
	// Lower first would not work: to freeze the filesystem is to write.
	s, err := m.SuspendAll(m.ctx, []Mapped{lower, top}, time.Hour)
	m.must(err)
	if !m.see(top).Suspended || !m.see(lower).Suspended || !s.Holds() {
		t.Fatal("not suspended")
	}
	thread, done := writer(filepath.Join(point, "file"))
	m.until("the writer waits", func() bool { return blocked(thread) })
	if _, err := m.SuspendAll(m.ctx, []Mapped{top}, time.Hour); !errors.Is(err, fault.InUse) {
		t.Fatalf("suspended twice: %v", err)
	}
	select {
	case err := <-done:
		t.Fatalf("written to a suspended device: %v", err)
	default:
	}
	m.must(s.Resume())
	m.must(<-done)
	if m.see(top).Suspended || m.see(lower).Suspended {
		t.Fatal("still suspended")
	}
	if err := s.Resume(); !errors.Is(err, fault.Conflict) {
		t.Fatalf("resumed twice: %v", err)
	}
}

func TestSuspendsAreAllOrNone(t *testing.T) {
	m := newMapper(t)
	a, b := m.create("a", m.space(64<<20)), m.create("b", m.space(64<<20))
	point := m.ext4(a)
	freeze, err := m.Freeze(m.ctx, point, time.Hour)
	m.must(err)
	if _, err := m.SuspendAll(m.ctx, []Mapped{a, b}, time.Hour); !errors.Is(err, fault.InUse) {
		t.Fatalf("over a frozen filesystem: %v", err)
	}
	if m.see(a).Suspended || m.see(b).Suspended {
		t.Fatal("some are suspended")
	}
	m.must(freeze.Thaw())
	if _, err := m.SuspendAll(m.ctx, []Mapped{a, {Name: "none", UUID: m.uuid("none")}}, time.Hour); !errors.Is(err, fault.NotFound) {
		t.Fatalf("with one that is not there: %v", err)
	}
	if m.see(a).Suspended {
		t.Fatal("some are suspended")
	}
	s, err := m.SuspendAll(m.ctx, []Mapped{a, b, a}, time.Hour)
	m.must(err)
	m.must(s.Resume())
	none, err := m.SuspendAll(m.ctx, nil, time.Hour)
	m.must(err)
	m.must(none.Resume())
}

func TestASuspensionEndsAtItsLimit(t *testing.T) {
	m := newMapper(t)
	d := m.create("d", m.space(64<<20))
	point := m.ext4(d)
	s, err := m.SuspendAll(m.ctx, []Mapped{d}, 2*time.Second)
	m.must(err)
	_, done := writer(filepath.Join(point, "file"))
	m.must(<-done) // nobody resumes but the watchdog
	<-s.ended
	if s.Holds() {
		t.Fatal("it says that it holds")
	}
	m.must(m.LoadMapped(m.ctx, d, false, d.Targets))
	if err := s.Resume(); !errors.Is(err, fault.Conflict) {
		t.Fatalf("after the limit: %v", err)
	}
	if now := m.see(d); now.Suspended || !now.Inactive {
		t.Fatalf("%+v: a table that was loaded too late came into force", now)
	}
	m.must(m.ClearMapped(m.ctx, d))
	m.must(m.ClearMapped(m.ctx, d))
	if m.see(d).Inactive {
		t.Fatal("still there")
	}
}

// A resume by another hand breaks a cut as well.
func TestAnotherProgramsResumeIsNoticed(t *testing.T) {
	m := newMapper(t)
	a, b := m.create("a", m.space(1<<20)), m.create("b", m.space(1<<20))
	s, err := m.SuspendAll(m.ctx, []Mapped{a, b}, time.Hour)
	m.must(err)
	m.must(m.ResumeMapped(m.ctx, a))
	if err := s.Resume(); !errors.Is(err, fault.Conflict) {
		t.Fatalf("%v", err)
	}
	if m.see(b).Suspended {
		t.Fatal("still suspended")
	}
}

func TestTheWatchdogHoldsNothingAndMayDie(t *testing.T) {
	m := newMapper(t)
	d := m.create("d", m.space(1<<20))
	s, err := m.SuspendAll(m.ctx, []Mapped{d}, time.Hour)
	m.must(err)
	proc := fmt.Sprintf("/proc/%d/", s.dog.pid)
	open, err := os.ReadDir(proc + "fd")
	m.must(err)
	if len(open) != 2 { // its end of the socket, the control node
		t.Errorf("it has %d files open: %v", len(open), open)
	}
	status, err := os.ReadFile(proc + "status")
	m.must(err)
	if !strings.HasPrefix(string(status), "Name:\tquarry-watchdog\n") || strings.Contains(string(status), "VmLck:\t       0 kB") {
		t.Errorf("its state: %s", status)
	}
	m.must(unix.Kill(s.dog.pid, unix.SIGKILL))
	m.until("this process resumes", func() bool { return !m.see(d).Suspended })
	<-s.ended
	if err := s.Resume(); !errors.Is(err, fault.Conflict) {
		t.Fatalf("%v", err)
	}
}

const suspendUUIDs = "QUARRY_TEST_SUSPEND"

// holdSuspended starts a process that suspends devices and waits to be killed.
func holdSuspended(t *testing.T, uuids ...string) *exec.Cmd {
	t.Helper()
	c := exec.Command(os.Args[0], "-test.run", "^TestHelperHoldsASuspension$")
	c.Env = append(os.Environ(), suspendUUIDs+"="+strings.Join(uuids, ","))
	c.Stderr = os.Stderr
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill() })
	var b [1]byte
	if _, err := out.Read(b[:]); err != nil || b[0] != '+' {
		t.Fatalf("the helper said %q, %v", b, err)
	}
	return c
}

func TestDevicesResumeWhenTheAgentIsKilled(t *testing.T) {
	m := newMapper(t)
	a, b := m.create("a", m.space(64<<20)), m.create("b", m.space(1<<20))
	point := m.ext4(a)
	helper := holdSuspended(t, a.UUID, b.UUID)
	if !m.see(a).Suspended || !m.see(b).Suspended {
		t.Fatal("not suspended")
	}
	// As in a switch: the new table reads the same.
	top := over(m.see(b))
	top[0].Params = m.see(b).Targets[0].Params
	m.must(m.LoadMapped(m.ctx, b, false, top))
	_, done := writer(filepath.Join(point, "file"))
	m.must(helper.Process.Kill())
	_ = helper.Wait()
	m.must(<-done)
	m.until("both are resumed", func() bool { return !m.see(a).Suspended && !m.see(b).Suspended })
	if m.see(b).Inactive {
		t.Fatal("the loaded table is still inactive")
	}
}

func TestWhatAKilledAgentLeftIsTakenOver(t *testing.T) {
	m := newMapper(t)
	table := m.space(1 << 20)
	// Created, no table.
	_, err := m.dm(m.ctx, "create", quick, unix.DM_DEV_CREATE, dmRequest{Name: m.name("d"), UUID: m.uuid("d")})
	m.must(err)
	left, err := m.Mapped(m.ctx, m.uuid("d"))
	if err != nil || len(left) != 1 || left[0].Targets != nil || left[0].Size != 0 {
		t.Fatalf("%+v, %v", left, err)
	}
	d := m.create("d", table)
	// Suspended, with an inactive table.
	m.must(m.SuspendMapped(m.ctx, d, true))
	m.must(m.LoadMapped(m.ctx, d, false, m.space(2<<20)))
	if d = m.create("d", table); d.Suspended || d.Inactive {
		t.Fatalf("%+v", d)
	}
	if now := m.see(d); now.Suspended || now.Inactive || now.Size != 1<<20 {
		t.Fatalf("%+v", now)
	}
	// Loaded, never resumed.
	_, err = m.dm(m.ctx, "create", quick, unix.DM_DEV_CREATE, dmRequest{Name: m.name("e"), UUID: m.uuid("e")})
	m.must(err)
	m.must(m.LoadMapped(m.ctx, Mapped{UUID: m.uuid("e")}, false, m.space(2<<20)))
	if e := m.create("e", m.space(1<<20)); e.Size != 1<<20 || e.Inactive {
		t.Fatalf("%+v", e)
	}
	// Another table.
	_, err = m.CreateMapped(m.ctx, m.name("d"), m.uuid("d"), false, m.space(1<<20))
	if !errors.Is(err, fault.Conflict) || !strings.Contains(err.Error(), d.Targets[0].Params) {
		t.Fatalf("another table: %v", err)
	}
	// Suspended when the agent died with its watchdog, one above the other.
	top := m.create("top", over(d))
	m.must(m.SuspendMapped(m.ctx, top, true))
	m.must(m.SuspendMapped(m.ctx, d, true))
	resumed, err := m.ResumeLeft(m.ctx, m.uuid(""))
	if err != nil || len(resumed) != 2 || resumed[0].UUID != d.UUID || resumed[1].UUID != top.UUID {
		t.Fatalf("%+v, %v", resumed, err)
	}
	if m.see(d).Suspended || m.see(top).Suspended {
		t.Fatal("still suspended")
	}
}

func TestForeignDevicesAreNotTouched(t *testing.T) {
	m := newMapper(t)
	table := m.space(1 << 20)
	for _, uuid := range []string{"", "LVM-of-somebody"} {
		_, err := m.dm(m.ctx, "create", quick, unix.DM_DEV_CREATE, dmRequest{Name: m.name("d"), UUID: uuid})
		m.must(err)
		_, err = m.CreateMapped(m.ctx, m.name("d"), m.uuid("d"), false, table)
		if !errors.Is(err, fault.InUse) || !strings.Contains(err.Error(), m.name("d")) || !strings.Contains(err.Error(), uuid) {
			t.Fatalf("under the name of a device with UUID %q: %v", uuid, err)
		}
		if ours, err := m.MappedByUUID(m.ctx, m.uuid("d")); err != nil || ours != nil {
			t.Fatalf("%+v, %v", ours, err)
		}
		_, err = m.dm(m.ctx, "remove", quick, unix.DM_DEV_REMOVE, dmRequest{Name: m.name("d")})
		m.must(err)
	}
}

func TestWhatIsInUseStays(t *testing.T) {
	m := newMapper(t)
	d := m.create("d", m.space(1<<20))
	top := m.create("top", over(d))
	err := m.RemoveMapped(m.ctx, d)
	if !errors.Is(err, fault.InUse) || !strings.Contains(err.Error(), fmt.Sprintf("dm-%d", top.Minor)) {
		t.Fatalf("below another device: %v", err)
	}
	if open := m.see(d).Open; open != 1 {
		t.Fatalf("open %d times", open)
	}
	f, err := os.Open(top.Path)
	m.must(err)
	if err := m.RemoveMapped(m.ctx, top); !errors.Is(err, fault.InUse) {
		t.Fatalf("open: %v", err)
	}
	m.must(f.Close())
	for range 2 {
		m.must(m.RemoveMapped(m.ctx, top))
	}
	m.must(m.RemoveMapped(m.ctx, d))
	for what, err := range map[string]error{
		"load": m.LoadMapped(m.ctx, d, false, m.space(1<<20)), "clear": m.ClearMapped(m.ctx, d),
		"suspend": m.SuspendMapped(m.ctx, d, true), "resume": m.ResumeMapped(m.ctx, d),
	} {
		if !errors.Is(err, fault.NotFound) {
			t.Errorf("%s of a device that is gone: %v", what, err)
		}
	}
}

func TestTablesThatTheKernelRefusesLeaveNothing(t *testing.T) {
	m := newMapper(t)
	for what, c := range map[string]struct {
		table Target
		kind  fault.Kind
	}{
		"too small":       {Target{Length: 1 << 50, Type: "linear", Params: m.disk + " 0"}, fault.Unavailable},
		"no such device":  {Target{Length: 1 << 20, Type: "linear", Params: "250:77 0"}, fault.Unavailable},
		"no such path":    {Target{Length: 1 << 20, Type: "linear", Params: "/dev/quarry-none 0"}, fault.NotFound},
		"no such target":  {Target{Length: 1 << 20, Type: "quarry", Params: ""}, fault.Unavailable},
		"not a device":    {Target{Length: 1 << 20, Type: "linear", Params: "/dev/null 0"}, fault.Invalid},
		"not in sectors":  {Target{Length: 1000, Type: "zero"}, fault.Invalid},
		"not from the 0.": {Target{Start: 512, Length: 512, Type: "zero"}, fault.Invalid},
	} {
		_, err := m.CreateMapped(m.ctx, m.name("d"), m.uuid("d"), false, []Target{c.table})
		if !errors.Is(err, c.kind) {
			t.Errorf("%s: %v", what, err)
		}
		if left, err := m.Mapped(m.ctx, m.uuid("")); err != nil || len(left) != 0 {
			t.Fatalf("%s left %+v, %v", what, left, err)
		}
	}
	// A disk that is mounted belongs to somebody.
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", m.disk, "64M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	point := t.TempDir()
	m.must(m.MountFilesystem(m.ctx, m.disk, point, "ext4", nil))
	_, err := m.CreateMapped(m.ctx, m.name("d"), m.uuid("d"), false, m.space(1<<20))
	m.must(m.Unmount(m.ctx, point))
	if !errors.Is(err, fault.InUse) {
		t.Fatalf("over a mounted disk: %v", err)
	}
}

func TestManyDevicesAreListedWithTheirTables(t *testing.T) {
	m := newMapper(t)
	const n, targets = 20, 200 // an answer that does not fit the first buffer
	want := map[string]Mapped{}
	var long []Target
	for i := range targets {
		part := m.space(1 << 20)[0]
		part.Start = int64(i) << 20
		long = append(long, part)
	}
	for i := range n {
		table := m.space(1 << 20)
		if i == n/2 {
			table = long
		}
		d := m.create(fmt.Sprint(i), table)
		want[d.UUID] = d
	}
	got, err := m.Mapped(m.ctx, m.uuid(""))
	m.must(err)
	if len(got) != n {
		t.Fatalf("%d devices", len(got))
	}
	for _, d := range got {
		if w := want[d.UUID]; d.Name != w.Name || d.Path != w.Path || d.Size != w.Size || !sameTable(d.Targets, w.Targets) {
			t.Errorf("got %+v, want %+v", d, w)
		}
		var st unix.Stat_t
		m.must(unix.Stat(d.Path, &st))
		if st.Rdev != unix.Mkdev(d.Major, d.Minor) {
			t.Errorf("%s has the number %#x", d.Path, st.Rdev)
		}
		m.must(os.Remove(d.Path)) // as in a new container with a /dev of its own
	}
	if got, err = m.Mapped(m.ctx, m.uuid("1")); err != nil || len(got) != 11 { // 1, 10 to 19
		t.Fatalf("%d devices, %v", len(got), err)
	}
	for _, d := range got {
		m.must(m.FlushDevice(m.ctx, d.Path))
	}
	if other, err := m.Mapped(m.ctx, "QUARRY-NOBODY"); err != nil || len(other) != 0 {
		t.Fatalf("%+v, %v", other, err)
	}
}

func TestKeysAreNotShown(t *testing.T) {
	m := newMapper(t)
	key := strings.Repeat("5ec1e7", 11)[:64]
	table := m.space(1 << 20)
	table[0] = Target{Length: 1 << 20, Type: "crypt", Params: "aes-xts-plain64 " + key + " 0 " + table[0].Params, Secret: true}
	d := m.create("crypt", table)
	m.write(d, 0, 'a', 4096)
	m.reads(d, 0, 'a', 4096)
	all, err := m.Mapped(m.ctx, m.uuid(""))
	m.must(err)
	again := m.create("crypt", table)
	wrong := slices.Clone(table)
	wrong[0].Params = strings.Replace(table[0].Params, key, strings.Repeat("0", 64), 1)
	_, err = m.CreateMapped(m.ctx, d.Name, d.UUID, false, wrong)
	if !errors.Is(err, fault.Conflict) {
		t.Fatalf("with another key: %v", err)
	}
	if shown := fmt.Sprintf("%+v %+v %+v %v", d, all, again, err); strings.Contains(shown, key) || !strings.Contains(shown, "aes-xts-plain64 - 0") {
		t.Fatal("a key is shown, or the rest is not")
	}
}

// children names the processes that this one started and that are not gone.
func children(t *testing.T) (out []string) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		b, err := os.ReadFile(path)
		_, rest, _ := strings.Cut(string(b), ") ")
		if w := strings.Fields(rest); err == nil && len(w) > 1 && w[1] == fmt.Sprint(os.Getpid()) {
			out = append(out, string(b[:min(len(b), 60)]))
		}
	}
	return out
}

// Suspends leave neither children nor files behind, and udev does not get at the devices.
func TestSuspendsInARow(t *testing.T) {
	m := newMapper(t)
	d := m.create("d", m.space(64<<20))
	m.ext4(d)
	files := func() int {
		open, err := os.ReadDir("/proc/self/fd")
		m.must(err)
		return len(open)
	}
	before, others := files(), children(t)
	const n = 100
	var begin, end, dog []time.Duration
	for range n {
		t0 := time.Now()
		s, err := m.SuspendAll(m.ctx, []Mapped{d}, time.Hour)
		m.must(err)
		t1 := time.Now()
		m.must(s.Resume())
		begin, end = append(begin, t1.Sub(t0)), append(end, time.Since(t1))
		dog = append(dog, watchdogTime(t, m))
	}
	slices.Sort(begin)
	slices.Sort(end)
	slices.Sort(dog)
	t.Logf("of a mounted ext4, median and 99th of 100: SuspendAll %s, %s (of that the watchdog %s, %s); Resume %s, %s",
		begin[n/2], begin[n-2], dog[n/2], dog[n-2], end[n/2], end[n-2])
	if after := files(); after > before {
		t.Errorf("%d files were open before and %d are after", before, after)
	}
	if left := children(t); len(left) > len(others) {
		t.Errorf("children are left: %q", left)
	}
}

// watchdogTime is what a watchdog takes to be ready.
func watchdogTime(t *testing.T, m *mapper) time.Duration {
	control, err := m.control(m.ctx)
	m.must(err)
	t0 := time.Now()
	d, err := startWatchdog(control, nil, time.Hour)
	m.must(err)
	took := time.Since(t0)
	d.dismiss()
	if !d.wait() {
		t.Error("it failed")
	}
	m.must(d.close())
	return took
}

func TestFiguresOfRequests(t *testing.T) {
	m := newMapper(t)
	const n = 50
	table := m.space(1 << 20)
	took := map[string][]time.Duration{}
	clock := func(what string, f func() error) {
		t0 := time.Now()
		m.must(f())
		took[what] = append(took[what], time.Since(t0))
	}
	for range n {
		var d Mapped
		clock("create", func() (err error) { d, err = m.CreateMapped(m.ctx, m.name("d"), m.uuid("d"), false, table); return })
		clock("ask", func() error { _, err := m.MappedByUUID(m.ctx, d.UUID); return err })
		clock("list", func() error { _, err := m.Mapped(m.ctx, m.uuid("")); return err })
		clock("suspend", func() error { return m.SuspendMapped(m.ctx, d, true) })
		clock("load", func() error { return m.LoadMapped(m.ctx, d, false, table) })
		clock("resume", func() error { return m.ResumeMapped(m.ctx, d) })
		clock("status", func() error { _, err := m.StatusMapped(m.ctx, d); return err })
		clock("remove", func() error { return m.RemoveMapped(m.ctx, d) })
		clock("capable", func() error { return m.DeviceMapper(m.ctx) })
	}
	for what, d := range took {
		slices.Sort(d)
		t.Logf("%-8s median %s, longest %s", what, d[n/2], d[n-1])
	}
}
