package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/quarry-csi/quarry/cmd/internal/engines"
	"github.com/quarry-csi/quarry/pkg/domain"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginepb"
	"github.com/quarry-csi/quarry/pkg/engine/enginetest"
	"github.com/quarry-csi/quarry/pkg/engine/remote"
	"github.com/quarry-csi/quarry/pkg/engine/serve"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// eventually waits for a condition.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it did not happen: " + what)
		}
	}
}

// testStorages are those of a program; the engines' processes are this one again.
func testStorages(t *testing.T) storages {
	t.Helper()
	t.Setenv(asQuarry, "1")
	return storages{registry: engines.Registry(host.Exec{}), node: "n1", watch: remote.Silence, local: host.NewLocal(host.Exec{})}
}

// shortDir is for sockets, whose paths may have 107 bytes only.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "q-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// openApart opens a domain and closes it when the test ends.
func openApart(t *testing.T, s storages, e domain.Entry) engine.Engine {
	t.Helper()
	opened, err := s.open(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := opened.Close(); err != nil {
			t.Error(err)
		}
	})
	return opened
}

// child is the process of an engine that was opened with process: true.
func child(t *testing.T, e engine.Engine) int {
	t.Helper()
	d, err := e.Describe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range d.Notes {
		if strings.Contains(n, "in a process of its own") {
			var pids []int
			all, _ := filepath.Glob("/proc/[0-9]*/stat")
			for _, path := range all {
				stat, _ := os.ReadFile(path)
				fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
				if len(fields) > 1 && fields[1] == strconv.Itoa(os.Getpid()) && fields[0] != "Z" {
					pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
					pids = append(pids, pid)
				}
			}
			if len(pids) != 1 {
				t.Fatalf("processes %v", pids)
			}
			return pids[0]
		}
	}
	t.Fatalf("it is not in a process: %q", d.Notes)
	return 0
}

// TestAnEngineInAProcessOfItsOwnConforms, confined, and as another user: as root it is allowed more.
func TestAnEngineInAProcessOfItsOwnConforms(t *testing.T) {
	needRoot(t, "confining a process")
	s, base := testStorages(t), shortDir(t)
	if err := os.Chmod(base, 0o755); err != nil {
		t.Fatal(err)
	}
	n, last := 0, ""
	domain := func(t testing.TB) func(testing.TB) engine.Engine {
		n++
		last = fmt.Sprintf("%s/%d", base, n)
		e := domain.Entry{Name: "d", Engine: "dir", Process: true, Params: map[string]string{"path": last}}
		if err := errors.Join(os.Mkdir(last, 0o700), os.Chown(last, 4711, 4711)); err != nil {
			t.Fatal(err)
		}
		return func(t testing.TB) engine.Engine {
			opened, err := s.open(context.Background(), e)
			if err != nil {
				t.Fatal(err)
			}
			return opened
		}
	}
	probe := domain(t)(t)
	expect := engine.Discover(probe).List()
	if err := probe.Close(); err != nil {
		t.Fatal(err)
	}
	enginetest.Run(t, enginetest.Harness{Domain: domain, Expect: expect, Behind: true, Slow: true, Foreign: func(t testing.TB, content []byte) string {
		if err := errors.Join(os.Mkdir(last+"/import", 0o755), os.WriteFile(last+"/import/disk.img", content, 0o644)); err != nil {
			t.Fatal(err)
		}
		return "disk.img"
	}})
}

func TestAnEnginesProcessHasWhatItNeedsAndNoMore(t *testing.T) {
	needRoot(t, "confining a process")
	s := testStorages(t)
	for _, owner := range []int{0, 4711} {
		t.Run(strconv.Itoa(owner), func(t *testing.T) {
			dir := shortDir(t)
			if err := errors.Join(os.Mkdir(dir+"/d", 0o700), os.Chmod(dir, 0o755), os.Chown(dir+"/d", owner, owner)); err != nil {
				t.Fatal(err)
			}
			e := openApart(t, s, domain.Entry{Name: "d", Engine: "dir", Process: true, Params: map[string]string{"path": dir + "/d"}})
			said, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", child(t, e)))
			if err != nil {
				t.Fatal(err)
			}
			var want uint64
			for _, n := range s.registry["dir"].Needs {
				want |= 1 << n
			}
			for _, line := range []string{fmt.Sprintf("CapPrm:\t%016x", want), fmt.Sprintf("CapEff:\t%016x", want), fmt.Sprintf("CapBnd:\t%016x", want),
				fmt.Sprintf("Uid:\t%d\t%[1]d", owner), fmt.Sprintf("Gid:\t%d\t%[1]d", owner), "Groups:\t", "NoNewPrivs:\t1"} {
				if owner != 0 && strings.HasPrefix(line, "CapBnd") {
					continue // it needs CAP_SETPCAP to be dropped, and no program gets new privileges
				}
				if !strings.Contains(string(said), line) {
					t.Errorf("no %q in\n%s", line, said)
				}
			}
			if err := e.CreateSlab(t.Context(), engine.SlabSpec{ID: "tree", Kind: engine.Tree, Size: 1 << 20}); err != nil {
				t.Fatal(err)
			}
			a, err := e.AttachSlab(t.Context(), "tree", engine.AttachOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if info, err := os.Stat(a.Path); err != nil || info.Sys().(*syscall.Stat_t).Uid != 0 || info.Mode().Perm() != 0o755 {
				t.Errorf("the tree is %v, %v", info, err)
			}
		})
	}
}

// TestADomainGoesFromOneProcessToAnother: what root has made a user's process can change, and the reverse.
func TestADomainGoesFromOneProcessToAnother(t *testing.T) {
	needRoot(t, "confining a process")
	s, dir := testStorages(t), shortDir(t)
	at := dir + "/d"
	if err := errors.Join(os.Mkdir(at, 0o700), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	entry := domain.Entry{Name: "d", Engine: "dir", Params: map[string]string{"path": at}}
	ctx := t.Context()
	for round, owner := range []int{0, 4711, 0} {
		must(os.Chown(at, owner, owner))
		entry.Process = owner != 0
		e, err := s.open(ctx, entry)
		must(err)
		mine, before := fmt.Sprintf("r%d", round), fmt.Sprintf("r%d", round-1)
		for _, kind := range []engine.Kind{engine.Block, engine.Tree} {
			must(e.CreateSlab(ctx, engine.SlabSpec{ID: mine + string(kind), Kind: kind, Size: 1 << 20}))
			must(e.CreateTag(ctx, engine.Tag{Name: mine + string(kind), Record: []byte(mine)}))
			a, err := e.AttachSlab(ctx, mine+string(kind), engine.AttachOptions{})
			must(err)
			if kind == engine.Tree { // somebody else's, in a folder that nobody may change
				must(errors.Join(os.MkdirAll(a.Path+"/x/y", 0o755), os.Chown(a.Path+"/x/y", 99, 99), os.Chown(a.Path+"/x", 99, 99), os.Chmod(a.Path+"/x", 0o1500)))
			}
			if round == 0 {
				continue
			}
			old := before + string(kind)
			must(e.CreateSlab(ctx, engine.SlabSpec{ID: old, Kind: kind, Size: 1 << 20})) // it is there
			must(e.ResizeSlab(ctx, old, 2<<20))
			_, err = e.AttachSlab(ctx, old, engine.AttachOptions{})
			must(errors.Join(err, e.DetachSlab(ctx, old), e.DeleteSlab(ctx, old), e.DeleteTag(ctx, old)))
		}
		slabs, err := e.ListSlabs(ctx)
		must(err)
		tags, err := e.ListTags(ctx, "")
		must(err)
		if len(slabs) != 2 || len(tags) != 2 {
			t.Errorf("round %d: slabs %v, tags %v", round, slabs, tags)
		}
		must(e.Close())
	}
}

// TestAnEnginesProcessThatEndsOrHangsIsReplaced: what it was asked fails as one that cannot be
// reached, and goes on afterwards.
func TestAnEnginesProcessThatEndsOrHangsIsReplaced(t *testing.T) {
	needRoot(t, "confining a process")
	s, m := testStorages(t), newMetrics()
	s.watch, s.started = 3*time.Second, m.engineStarted
	dir := shortDir(t)
	e := openApart(t, s, domain.Entry{Name: "d", Engine: "dir", Process: true, Params: map[string]string{"path": dir}})
	for i, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGSTOP, syscall.SIGKILL} {
		before := child(t, e)
		if err := syscall.Kill(before, signal); err != nil {
			t.Fatal(err)
		}
		tag := engine.Tag{Name: fmt.Sprintf("t.%d", i), Record: []byte(signal.String())}
		eventually(t, "a tag is created after "+signal.String(), func() bool {
			err := e.CreateTag(t.Context(), tag) // waits for one that is stopped
			if err != nil && !errors.Is(err, fault.Unavailable) {
				t.Fatal(err)
			}
			return err == nil
		})
		if now := child(t, e); now == before {
			t.Errorf("process %d was not replaced after %s", now, signal)
		}
		if tags, err := e.ListTags(t.Context(), "t."); err != nil || len(tags) != i+1 {
			t.Errorf("tags %v, %v", tags, err)
		}
	}
	if n := testutil.ToFloat64(m.engines.WithLabelValues("d")); n != 4 {
		t.Errorf("the metric counts %v processes, and there were 4", n)
	}
}

// farAndNear are a domain whose engine is another process, and one that is not.
const farAndNear = `domains:
- name: near
  engine: dir
  params: {path: "{STORAGE}/near"}
- name: far
  %s
  params: {path: "{STORAGE}/far"}
`

// standing is a standalone with two domains, and its CSI.
type standing struct {
	t *testing.T
	place
	*running
	csi.ControllerClient
}

func newStanding(t *testing.T, far func(storage string) string) *standing {
	t.Helper()
	s := &standing{t: t, place: newPlace(t, "")}
	text := fmt.Sprintf(strings.ReplaceAll(farAndNear, "{STORAGE}", s.storage), far(s.storage))
	if err := errors.Join(os.Mkdir(s.storage+"/near", 0o755), os.Mkdir(s.storage+"/far", 0o755), os.WriteFile(s.dir+"/domains.yaml", []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
	s.running = begin(t, "Serving CSI", s.args()...)
	conn, err := grpc.NewClient("unix://"+s.dir+"/csi.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	s.ControllerClient = csi.NewControllerClient(conn)
	return s
}

func (s *standing) create(name, in string) error {
	_, err := s.CreateVolume(s.t.Context(), &csi.CreateVolumeRequest{Name: name, Parameters: map[string]string{"domain": in},
		VolumeCapabilities: []*csi.VolumeCapability{blockWriter()}, CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 20}})
	return err
}

// unavailable checks that far does not answer, as one that is away, and near does.
func (s *standing) unavailable(name string) {
	s.t.Helper()
	if err := s.create(name, "far"); status.Code(err) != codes.Unavailable {
		s.t.Errorf("while the engine is away: %v", err)
	}
	if err := s.create(name+"-near", "near"); err != nil {
		s.t.Errorf("the other domain: %v", err)
	}
}

// resumes waits until what could not be done is done.
func (s *standing) resumes(name string) {
	s.t.Helper()
	eventually(s.t, name+" is created", func() bool {
		err := s.create(name, "far")
		if err != nil && status.Code(err) != codes.Unavailable && status.Code(err) != codes.Aborted {
			s.t.Fatalf("%v:\n%s", err, s.said())
		}
		return err == nil
	})
}

func TestADomainBehindASocketOutlivesTheProcess(t *testing.T) {
	needRoot(t, "quarry standalone")
	socket := shortDir(t) + "/dir.sock"
	start := func() *running { return begin(t, "Serving", "engine", "dir", "--socket", "unix://"+socket) }
	far := start()
	s := newStanding(t, func(string) string { return "socket: " + socket })
	s.resumes("one")
	if err := far.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-far.ended
	s.unavailable("two")
	far = start()
	s.resumes("two")
	if err := s.create("one", "far"); err != nil { // the same, found again
		t.Error(err)
	}
	s.stop(t)
	far.stop(t)
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket stays: %v", err)
	}
}

func TestAProcessOfADomainEndsWithQuarryHoweverThatEnds(t *testing.T) {
	needRoot(t, "quarry standalone")
	s := newStanding(t, func(string) string { return "engine: dir\n  process: true" })
	s.resumes("one")
	started := regexp.MustCompile(`"An engine's process has started" .*pid=([0-9]+)`)
	pid := func(r *running) int {
		t.Helper()
		found := started.FindAllStringSubmatch(r.said(), -1)
		if len(found) == 0 {
			t.Fatalf("no process was started:\n%s", r.said())
		}
		n, _ := strconv.Atoi(found[len(found)-1][1])
		return n
	}
	first := pid(s.running)
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.resumes("two")
	if err := s.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-s.ended
	gone := func(pid int) func() bool {
		return func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }
	}
	eventually(t, "the process ends with a killed Quarry", gone(pid(s.running)))
	next := begin(t, "Serving CSI", s.args()...)
	s.resumes("two")
	next.stop(t)
	eventually(t, "the process ends with Quarry", gone(pid(next)))
}

// TestAnEngineThatIsKilledUnderLoadLosesNothing: what was asked for is there in the end, once, and
// nothing that was not.
func TestAnEngineThatIsKilledUnderLoadLosesNothing(t *testing.T) {
	needRoot(t, "quarry standalone")
	s := newStanding(t, func(string) string { return "engine: dir\n  process: true" })
	s.resumes("first")
	ctx := t.Context()
	retried := func(call func() error) error {
		for {
			err := call()
			if c := status.Code(err); c != codes.Unavailable && c != codes.Aborted {
				return err
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	const workers, each, kills = 4, 15, 5
	var made atomic.Int32
	var load errgroup.Group
	for w := range workers {
		load.Go(func() error {
			for i := range each {
				var id string
				request := &csi.CreateVolumeRequest{Name: fmt.Sprintf("w%d.%d", w, i), Parameters: map[string]string{"domain": "far"},
					VolumeCapabilities: []*csi.VolumeCapability{blockWriter()}, CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 20}}
				if err := retried(func() error {
					v, err := s.CreateVolume(ctx, request)
					id = v.GetVolume().GetVolumeId()
					return err
				}); err != nil {
					return err
				}
				made.Add(1)
				if i%3 == 0 {
					if err := retried(func() error {
						_, err := s.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
						return err
					}); err != nil {
						return err
					}
				}
			}
			return nil
		})
	}
	started := regexp.MustCompile(`"An engine's process has started" .*pid=([0-9]+)`)
	for n := range kills {
		eventually(t, "some are made", func() bool { return int(made.Load()) >= (n+1)*workers*each/(kills+1) })
		pids := started.FindAllStringSubmatch(s.said(), -1)
		pid, _ := strconv.Atoi(pids[len(pids)-1][1])
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
	}
	if err := load.Wait(); err != nil {
		t.Fatalf("%v:\n%s", err, s.said())
	}
	var list *csi.ListVolumesResponse
	if err := retried(func() (err error) {
		list, err = s.ListVolumes(ctx, &csi.ListVolumesRequest{})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if have, want := len(list.GetEntries()), 1+workers*each*2/3; have != want {
		t.Errorf("%d volumes, want %d", have, want)
	}
	for _, v := range list.GetEntries() {
		_, image, _ := strings.Cut(v.GetVolume().GetVolumeId(), "/")
		if info, err := os.Stat(s.storage + "/far/slabs/" + image); err != nil || info.Size() != 1<<20 {
			t.Errorf("volume %s: %v", v.GetVolume().GetVolumeId(), err)
		}
	}
	if n := len(started.FindAllString(s.said(), -1)); n < 3 {
		t.Errorf("the process was started %d times only", n)
	}
	s.stop(t)
}

// older is an engine that speaks another version of the protocol.
type older struct {
	enginepb.UnimplementedEngineServer
}

func (older) Open(context.Context, *enginepb.OpenRequest) (*enginepb.OpenResponse, error) {
	return &enginepb.OpenResponse{Version: 0, Domain: "d"}, nil
}

// TestWhatIsNoEngineIsRefusedWithTheReason, and nothing is changed.
func TestWhatIsNoEngineIsRefusedWithTheReason(t *testing.T) {
	dir := shortDir(t)
	listen := func(name string, serve func(net.Listener)) {
		l, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go serve(l)
	}
	listen("http", func(l net.Listener) { _ = http.Serve(l, http.NotFoundHandler()) })
	listen("csi", func(l net.Listener) { _ = grpc.NewServer().Serve(l) })
	listen("mute", func(net.Listener) {})
	listen("closes", func(l net.Listener) {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	})
	listen("older", func(l net.Listener) {
		g := grpc.NewServer()
		enginepb.RegisterEngineServer(g, older{})
		_ = g.Serve(l)
	})
	listen("engine", func(l net.Listener) {
		s := serve.New(serve.Config{Engine: "dir", Open: func(_ context.Context, params, _ map[string]string) (engine.Engine, error) {
			return nil, fault.New(fault.Invalid, "parameter %q is unknown", params["x"])
		}})
		_ = s.Serve(context.WithoutCancel(t.Context()), l)
	})
	if err := os.WriteFile(dir+"/file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/stale", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()

	s := storages{node: "n1", watch: 500 * time.Millisecond}
	// What gRPC says of a peer that hangs up depends on which of its reads and writes met that first.
	for name, want := range map[string]struct {
		kind fault.Kind
		text string
	}{
		"none":   {fault.Unavailable, "socket {DIR}/none: nothing is there: start the engine's process, or correct the path"},
		"file":   {fault.Invalid, "socket {DIR}/file is not a socket"},
		"stale":  {fault.Unavailable, "socket {DIR}/stale: connection error: desc = \"transport: Error while dialing: dial unix {DIR}/stale: connect: connection refused"},
		"http":   {fault.Unavailable, "socket {DIR}/http: "},
		"closes": {fault.Unavailable, "socket {DIR}/closes: "},
		"mute":   {fault.Deadline, "socket {DIR}/mute: "},
		"csi":    {fault.Unsupported, "socket {DIR}/csi: what listens there does not serve version 1 of quarry.engine.v1: unknown service quarry.engine.v1.Engine"},
		"older":  {fault.Internal, "socket {DIR}/older: the engine answered Open with version 0 and domain \"d\"; version 1 and a name for the domain were expected"},
		"engine": {fault.Invalid, "socket {DIR}/engine: parameter \"y\" is unknown"},
	} {
		ctx, cancel := t.Context(), context.CancelFunc(func() {})
		if name == "mute" {
			ctx, cancel = context.WithTimeout(ctx, time.Second)
		}
		_, err := s.open(ctx, domain.Entry{Name: "far", Engine: domain.SocketEngine, Socket: filepath.Join(dir, name), Params: map[string]string{"x": "y"}})
		cancel()
		text := "open in domain far: " + strings.ReplaceAll(want.text, "{DIR}", dir)
		if !errors.Is(err, want.kind) || !strings.HasPrefix(err.Error(), text) {
			t.Errorf("%s:\nhave %v (%v)\nwant %s (%v)", name, err, fault.KindOf(err), text, want.kind)
		}
	}
}

// TestAProcessIsRefusedWithTheReasonOfItsEngine, as if there was no process.
func TestAProcessIsRefusedWithTheReasonOfItsEngine(t *testing.T) {
	needRoot(t, "confining a process")
	s, dir := testStorages(t), shortDir(t)
	if err := os.WriteFile(dir+"/file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, params := range []map[string]string{{}, {"path": "relative"}, {"path": dir + "/none"}, {"path": dir + "/file"}, {"path": dir, "pth": dir}} {
		_, err := s.open(t.Context(), domain.Entry{Name: "d", Engine: "dir", Process: true, Params: params})
		want := s.registry.CheckParams("dir", params)
		if want == nil {
			_, want = s.registry["dir"].Open(t.Context(), params, nil)
		}
		if err == nil || err.Error() != "open in domain d: "+want.Error() || fault.KindOf(err) != fault.KindOf(want) {
			t.Errorf("%v:\nhave %v (%v)\nwant %v (%v)", params, err, fault.KindOf(err), want, fault.KindOf(want))
		}
	}
	s.registry["dir"] = domain.Factory{Params: func() map[string]string { return map[string]string{"bogus": ""} }}
	_, err := s.open(t.Context(), domain.Entry{Name: "d", Engine: "dir", Process: true, Params: map[string]string{"bogus": dir}})
	if want := `open in domain d: parameter "bogus" is unknown to engine "dir": only "path" is known`; !errors.Is(err, fault.Invalid) || err.Error() != want {
		t.Errorf("what the process says itself: %v, want %s", err, want)
	}
	s.registry["nothing"] = domain.Factory{}
	_, err = s.open(t.Context(), domain.Entry{Name: "d", Engine: "nothing", Process: true})
	if want := `open in domain d: the engine's process ended with exit status 1: quarry: engine "nothing" is unknown: known are "dir", "gluster", "lvm", "nfs3", "nfs4", "sharedfs", "smb": `; !errors.Is(err, fault.Unavailable) || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("a process that ends at once: %v, want %s", err, want)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("something was made: %v, %v", left, err)
	}
}

// TestNodesReachEnginesInOtherProcesses: the controller names them, the agents open them.
func TestNodesReachEnginesInOtherProcesses(t *testing.T) {
	needRoot(t, "quarry node")
	socket := shortDir(t) + "/s"
	begin(t, "Serving", "engine", "dir", "--socket", "unix://"+socket)
	c := newCluster(t, "domains:\n- {name: own, engine: dir, scope: shared, process: true, params: {path: \"{STORAGE}\"}}\n"+
		"- {name: far, engine: dir, socket: "+socket+", params: {path: \"{STORAGE}-far\"}}\n")
	c.must(os.Mkdir(c.storage+"-far", 0o755))
	controller := c.controller("c1")
	c.wait("c1 to lead", func() bool { return c.ready("c1") })
	agent := c.agent("n1")
	for _, name := range []string{"own", "far"} {
		v := again(t, csi.NewControllerClient(c.at("c1")).CreateVolume, &csi.CreateVolumeRequest{Name: name, Parameters: map[string]string{"domain": name},
			VolumeCapabilities: []*csi.VolumeCapability{blockWriter()}, CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 20},
			AccessibilityRequirements: &csi.TopologyRequirement{Preferred: []*csi.Topology{{Segments: map[string]string{"csi.quarry.dev/node": "n1"}}},
				Requisite: []*csi.Topology{{Segments: map[string]string{"csi.quarry.dev/node": "n1"}}}}}).GetVolume().GetVolumeId()
		if in, _, _ := strings.Cut(v, "/"); !strings.HasPrefix(in, name) {
			t.Errorf("volume %s, want it in %s", v, name)
		}
		f, err := os.OpenFile(c.publish("c1", "n1", v), os.O_RDWR, 0)
		c.must(err)
		_, err = f.WriteAt([]byte("written"), 4096)
		c.must(errors.Join(err, f.Close()))
		c.unpublish("c1", "n1", v)
		again(t, csi.NewControllerClient(c.at("c1")).DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: v})
	}
	if !strings.Contains(agent.said(), "An engine's process has started") {
		t.Errorf("the agent has started no process:\n%s", agent.said())
	}
	agent.stop(t)
	controller.stop(t)
}

func TestAProcessOfAnotherTypeIsRefused(t *testing.T) {
	socket := shortDir(t) + "/s"
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	server := serve.New(serve.Config{Engine: "other", Open: func(context.Context, map[string]string, map[string]string) (engine.Engine, error) {
		return closable{}, nil
	}})
	go func() { ended <- server.Serve(ctx, l) }()
	defer func() { cancel(); <-ended }()
	_, err = storages{node: "n1", watch: time.Second}.open(t.Context(), domain.Entry{Name: "far", Engine: "dir", Socket: socket})
	if want := `open in domain far: socket ` + socket + `: the engine says that it is "other": "dir" was expected`; !errors.Is(err, fault.Invalid) || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

func TestQuarryEngineRefusesWhatCannotWork(t *testing.T) {
	for args, want := range map[string]string{
		"engine":                                 "accepts 1 arg(s), received 0",
		"engine zfs --socket unix:///x":          `engine "zfs" is unknown: known are "dir", "gluster", "lvm", "nfs3", "nfs4", "sharedfs", "smb"`,
		"engine dir":                             "--socket is needed: unix:///path",
		"engine dir --socket tcp://:1":           `--socket: endpoint "tcp://:1": scheme "tcp" is not allowed: unix:///path`,
		"engine dir --socket unix:///etc/passwd": "--socket: endpoint unix:///etc/passwd: there is a file that is not a socket: remove it or choose another path",
	} {
		var stderr strings.Builder
		cmd := program(t.Context(), strings.Fields(args)...)
		cmd.Stderr = &stderr
		if err := cmd.Run(); err == nil || stderr.String() != "quarry: "+want+"\n" {
			t.Errorf("%s: %v: %s", args, err, stderr.String())
		}
	}
}
