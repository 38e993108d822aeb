package host

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// recorded is an answer of Linux 6.1 (Debian 12, amd64) to a request about the
// devices of quarry-rec: two parts of a disk, a layer that holds one of 4096
// chunks in them, and above it a suspended device with an inactive table.
func recorded(t *testing.T, name string) dmReply {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("recorded on amd64")
	}
	b, err := os.ReadFile(filepath.Join("testdata", "dm", name))
	if err != nil {
		t.Fatal(err)
	}
	r, err := decode(b)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

const mib = 1 << 20

func TestAnswersOfDeviceMapper(t *testing.T) {
	names, err := recorded(t, "list").names()
	if want := []string{"quarry-rec-base", "quarry-rec-cow", "quarry-rec-layer", "quarry-rec-two"}; err != nil || !slices.Equal(names, want) {
		t.Errorf("%q, %v", names, err)
	}
	r := recorded(t, "table-two")
	table, err := r.table()
	want := []Target{{Length: 8 * mib, Type: "linear", Params: "253:2 0"}, {Start: 8 * mib, Length: mib, Type: "zero"}}
	if err != nil || !slices.Equal(table, want) {
		t.Errorf("%+v, %v", table, err)
	}
	const flags = unix.DM_SUSPEND_FLAG | unix.DM_STATUS_TABLE_FLAG | unix.DM_ACTIVE_PRESENT_FLAG | unix.DM_INACTIVE_PRESENT_FLAG
	if r.Name != "quarry-rec-two" || r.UUID != "QUARRY-REC-two" || r.Major != 253 || r.Minor != 3 || r.Flags != flags || r.Open != 0 {
		t.Errorf("%+v", r)
	}
	table, err = recorded(t, "table-layer").table()
	if want := []Target{{Length: 8 * mib, Type: "snapshot", Params: "253:0 253:1 PO 8"}}; err != nil || !slices.Equal(table, want) {
		t.Errorf("%+v, %v", table, err)
	}
	if r := recorded(t, "table-layer"); r.Open != 1 {
		t.Errorf("open %d times", r.Open)
	}
	status, err := recorded(t, "status-layer").table()
	if err != nil || len(status) != 1 || status[0].Params != "24/32768 16" {
		t.Errorf("%+v, %v", status, err)
	}
}

func TestDamagedAnswersAreRefused(t *testing.T) {
	r := recorded(t, "table-two")
	r.Data = r.Data[:60]
	if table, err := r.table(); !errors.Is(err, fault.Internal) {
		t.Errorf("a table cut short: %+v, %v", table, err)
	}
	r = recorded(t, "list")
	r.Data = r.Data[:45]
	if names, err := r.names(); !errors.Is(err, fault.Internal) {
		t.Errorf("a list cut short: %q, %v", names, err)
	}
	r.Data = make([]byte, 16)
	if names, err := r.names(); err != nil || len(names) != 0 {
		t.Errorf("an empty list: %q, %v", names, err)
	}
	b := make([]byte, dmHeader)
	header(b).Data_start, header(b).Data_size = dmHeader, dmHeader+1
	if _, err := decode(b); !errors.Is(err, fault.Internal) {
		t.Errorf("an answer longer than its buffer: %v", err)
	}
}

// A request's targets have the layout of an answer's, but for the distance of
// the next: from the target itself, not from the first.
func TestRequestsHaveTheKernelsLayout(t *testing.T) {
	answer := recorded(t, "table-two")
	table, err := answer.table()
	if err != nil {
		t.Fatal(err)
	}
	b, err := dmRequest{Name: "quarry-rec-two", Table: table, Flags: unix.DM_READONLY_FLAG}.encode(0)
	if err != nil {
		t.Fatal(err)
	}
	h := header(b)
	if len(b) != dmHeader+0x60 || h.Version[0] != 4 || int(h.Data_size) != len(b) || h.Data_start != dmHeader || h.Target_count != 2 || h.Flags != unix.DM_READONLY_FLAG || unix.ByteSliceToString(h.Name[:]) != "quarry-rec-two" {
		t.Fatalf("%+v, %d bytes", h, len(b))
	}
	data, like := b[dmHeader:], bytes.Clone(answer.Data)
	like[0x30+20] = 0x30 // not 0x60: see above
	if !bytes.Equal(data[:len(like)], like) {
		t.Errorf("% x\nlike the answer:\n% x", data, like)
	}
	for _, r := range []dmRequest{{Name: strings.Repeat("n", MaxMappedName+1)}, {Name: "a/b"}, {UUID: strings.Repeat("u", MaxMappedUUID+1)}} {
		if _, err := r.encode(0); !errors.Is(err, fault.Invalid) {
			t.Errorf("%+v: %v", r, err)
		}
	}
	if _, err := (dmRequest{Name: strings.Repeat("n", MaxMappedName), UUID: strings.Repeat("u", MaxMappedUUID)}).encode(0); err != nil {
		t.Error(err)
	}
}

func TestTablesAreComparedAsTheKernelShowsThem(t *testing.T) {
	got, err := normalTable([]Target{{Length: mib, Type: "crypt", Params: " aes  5ec1e7 0 7:0\t0 ", Secret: true}})
	if err != nil || got[0].Params != "aes 5ec1e7 0 7:0 0" {
		t.Fatalf("%+v, %v", got, err)
	}
	if !sameTable(got, []Target{{Length: mib, Type: "crypt", Params: "aes 5ec1e7 0 7:0 0"}}) || sameTable(got, hidden(got)) {
		t.Error("keys must count")
	}
	if text := tableText(got); text != "0 2048 crypt aes - 0 7:0 0" {
		t.Errorf("for messages: %q", text)
	}
	if named := hidden([]Target{{Type: "crypt", Params: "aes :64:logon:x 0 7:0 0"}}); named[0].Params != "aes :64:logon:x 0 7:0 0" {
		t.Errorf("the name of a key: %+v", named)
	}
	for what, bad := range map[string][]Target{
		"none": nil, "gap": {{Length: mib, Type: "zero"}, {Start: 2 * mib, Length: mib, Type: "zero"}},
		"part of a sector": {{Length: 100, Type: "zero"}}, "empty": {{Type: "zero"}},
		"type": {{Length: mib, Type: "sixteen-letters-"}}, "zero byte": {{Length: mib, Type: "linear", Params: "7:0 \x00"}},
		"no device": {{Length: mib, Type: "linear", Params: "/dev/null 0"}},
	} {
		if _, err := normalTable(bad); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := normalTable([]Target{{Length: mib, Type: "linear", Params: "/dev/quarry-none 0"}}); !errors.Is(err, fault.NotFound) {
		t.Errorf("%v", err)
	}
}

func TestLowerDevicesComeFirst(t *testing.T) {
	on := func(minor uint32, params string) Mapped {
		return Mapped{Name: params, Major: 253, Minor: minor, Targets: []Target{{Type: "snapshot", Params: params}}}
	}
	var got []uint32
	for _, m := range lowerFirst([]Mapped{on(1, "253:3 253:12 PO 8"), on(2, "7:0 0"), on(3, "7:1 0"), on(12, "253:3 0"), on(5, "253:5 0")}) {
		got = append(got, m.Minor)
	}
	if !slices.Equal(got, []uint32{3, 12, 1, 2, 5}) {
		t.Errorf("%v", got)
	}
}

// dog starts a watchdog over no device: that needs no device-mapper.
func dog(t *testing.T, limit time.Duration) *resumer {
	t.Helper()
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	d, err := startWatchdog(int(null.Fd()), nil, limit)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.close() })
	return d
}

func (d *resumer) status(t *testing.T) int {
	t.Helper()
	var st unix.WaitStatus
	if _, err := unix.Wait4(d.pid, &st, 0, nil); err != nil || !st.Exited() {
		t.Fatalf("%v, %v", st, err)
	}
	return st.ExitStatus()
}

func TestAWatchdogIsAskedAndDismissed(t *testing.T) {
	needLockedMemory(t)
	d := dog(t, time.Hour)
	for range 3 {
		if !d.ask() {
			t.Fatal("no answer")
		}
	}
	d.dismiss()
	if st := d.status(t); st != dogDismissed {
		t.Fatalf("status %d", st)
	}
	if d.ask() {
		t.Fatal("an answer of one that is gone")
	}
}

func TestAWatchdogActsAtItsLimitAndWhenItsParentIsGone(t *testing.T) {
	needLockedMemory(t)
	if st := dog(t, 50*time.Millisecond).status(t); st != dogResumed {
		t.Errorf("at the limit: status %d", st)
	}
	d := dog(t, time.Hour)
	_ = d.close()
	if st := d.status(t); st != dogResumed {
		t.Errorf("alone: status %d", st)
	}
}

func TestAWatchdogThatIsKeptOutlivesItsLimit(t *testing.T) {
	needLockedMemory(t)
	for limit := time.Second; ; limit *= 2 { // this machine may be slower than the first
		d := dog(t, limit)
		begun := time.Now()
		last, kept := begun, true
		for kept && time.Since(begun) < 2*limit {
			if kept = d.keep(); !kept {
				if time.Since(last) < limit {
					t.Fatal("it did not stay")
				}
				break
			}
			last = time.Now()
			time.Sleep(limit / 20)
		}
		if kept {
			if st := d.status(t); st != dogResumed { // nobody keeps it any more
				t.Errorf("status %d", st)
			}
			if d.keep() {
				t.Error("one that is gone was kept")
			}
			return
		}
	}
}

// The child is a copy of a program with many threads, in whatever state they are.
func TestWatchdogsOfABusyProgram(t *testing.T) {
	needLockedMemory(t)
	stop := make(chan struct{})
	var busy sync.WaitGroup
	for range 4 {
		busy.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					if b := make([]byte, 1<<16); len(b) == 0 {
						t.Error("unreachable")
					}
				}
			}
		})
	}
	var longest time.Duration
	for range 10 {
		t0 := time.Now()
		d := dog(t, time.Hour)
		longest = max(longest, time.Since(t0))
		if !d.ask() {
			t.Error("no answer")
		}
		d.dismiss()
		if st := d.status(t); st != dogDismissed {
			t.Errorf("status %d", st)
		}
	}
	close(stop)
	busy.Wait()
	t.Logf("the longest start took %s", longest)
}

func TestAWatchdogThatCannotWorkIsNoticed(t *testing.T) {
	needLockedMemory(t)
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if _, err := startWatchdog(int(null.Fd()), []string{"QUARRY-NONE"}, time.Hour); !errors.Is(err, fault.Unavailable) {
		t.Fatalf("%v", err)
	}
}

func needLockedMemory(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to lock memory")
	}
}

func TestANodeWithoutDeviceMapperSaysWhatIsMissing(t *testing.T) {
	if _, err := miscNumber("device-mapper"); err == nil {
		t.Skip("this node has device-mapper")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	err := NewLocal(Exec{}).DeviceMapper(context.Background())
	if !errors.Is(err, fault.Unsupported) || !strings.Contains(err.Error(), "dm-mod") {
		t.Fatalf("%v", err)
	}
}

// TestHelperHoldsASuspension is no test but the process that
// TestDevicesResumeWhenTheAgentIsKilled kills.
func TestHelperHoldsASuspension(t *testing.T) {
	uuids := os.Getenv(suspendUUIDs)
	if uuids == "" {
		return
	}
	var devices []Mapped
	for _, uuid := range strings.Split(uuids, ",") {
		devices = append(devices, Mapped{UUID: uuid})
	}
	if _, err := NewLocal(Exec{}).SuspendAll(context.Background(), devices, time.Hour); err != nil {
		t.Fatal(err)
	}
	_, _ = os.Stdout.WriteString("+")
	select {}
}
