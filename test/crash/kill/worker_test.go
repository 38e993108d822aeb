package kill_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	mib = 1 << 20
	// Most volumes and snapshots that a worker keeps.
	mostVolumes, mostSnapshots = 4, 4
)

// volume is a volume as its user knows it.
type volume struct {
	name, id, domain string
	fs               string // "" for raw block
	size             int64
	h                *history

	node    map[string]string // publish context
	staging string
	target  string // "" while it is not mounted
	w       *writer
}

// snapshot as its user knows it.
type snapshot struct {
	name, id, domain, fs string
	size                 int64
	m                    moment
	group                *group
}

type group struct {
	name, id string
	members  []*snapshot
}

// worker is a user who works alone on what is its own.
type worker struct {
	q      *quarry
	l      *ledger
	active *writers
	id     int
	rnd    *rand.Rand
	next   int
	done   map[string]int // steps, by what they did

	volumes   []*volume
	snapshots []*snapshot
	free      []string // names that were used and are free again
}

// writers that are at work.
type writers struct {
	mu  sync.Mutex
	all map[*writer]bool
}

func (w *writers) set(one *writer, on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if on {
		w.all[one] = true
	} else {
		delete(w.all, one)
	}
}

func (w *writers) list() []*writer {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Collect(maps.Keys(w.all))
}

// run works until enough is closed, then proves that everything is right and
// deletes it.
func (w *worker) run(ctx context.Context, enough <-chan struct{}) error {
	for {
		select {
		case <-enough:
			return w.finish(ctx)
		case <-ctx.Done():
			return ctx.Err()
		default:
		}
		if err := w.step(ctx); err != nil {
			return err
		}
	}
}

func (w *worker) step(ctx context.Context) error {
	steps := []struct {
		name   string
		weight int
		do     func(context.Context) (bool, error) // false: there was nothing to do
	}{
		{"create", 8, w.create}, {"forsake", 1, w.forsake},
		{"restore", 6, w.restore}, {"clone", 4, w.clone},
		{"snapshot", 10, w.snapshot}, {"group snapshot", 3, w.groupSnapshot},
		{"mount", 10, w.mountOne}, {"unmount", 5, w.unmountOne},
		{"expand", 3, w.expand},
		{"delete volume", 4, w.deleteVolume}, {"delete snapshot", 5, w.deleteSnapshot},
	}
	total := 0
	for _, s := range steps {
		total += s.weight
	}
	n := w.rnd.IntN(total)
	for _, s := range steps {
		if n -= s.weight; n >= 0 {
			continue
		}
		did, err := s.do(ctx)
		if did {
			w.done[s.name]++
		}
		if err != nil {
			return fmt.Errorf("worker %d: %s: %w", w.id, s.name, err)
		}
		return nil
	}
	return nil
}

// name is new, or one that was used and is free again.
func (w *worker) name() string {
	if len(w.free) > 0 && w.rnd.IntN(3) == 0 {
		n := w.free[0]
		w.free = w.free[1:]
		return n
	}
	w.next++
	return fmt.Sprintf("w%d-%d", w.id, w.next)
}

func (w *worker) domain() string { return []string{"native", "plain"}[w.rnd.IntN(2)] }

func capability(fs string) *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER}}
	if fs == "" {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fs}}
	}
	return c
}

func createRequest(name, domain, fs string, size int64, source *csi.VolumeContentSource) *csi.CreateVolumeRequest {
	return &csi.CreateVolumeRequest{Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size},
		VolumeCapabilities: []*csi.VolumeCapability{capability(fs)}, Parameters: map[string]string{"domain": domain}, VolumeContentSource: source}
}

// make creates a volume; what is in it is told by the caller.
func (w *worker) make(ctx context.Context, domain, fs string, size int64, source *csi.VolumeContentSource) (*volume, error) {
	v := &volume{name: w.name(), domain: domain, fs: fs}
	key := "volume " + v.name
	w.l.put(key, entry{phase: asked, most: size})
	reply, err := call(ctx, w.q.CreateVolume, createRequest(v.name, domain, fs, size, source))
	if err != nil {
		return nil, fmt.Errorf("create volume %s in %s: %w", v.name, domain, err)
	}
	v.id, v.size = reply.GetVolume().GetVolumeId(), reply.GetVolume().GetCapacityBytes()
	if v.size != size {
		return nil, fmt.Errorf("volume %s has %d bytes, asked for were %d", v.name, v.size, size)
	}
	w.l.put(key, entry{phase: there, handle: v.id, size: size, most: size})
	w.volumes = append(w.volumes, v)
	return v, nil
}

func (w *worker) room() bool { return len(w.volumes) < mostVolumes }

func (w *worker) kind() (fs string, size int64) {
	switch n := w.rnd.IntN(10); {
	case n < 3:
		return "", int64(1+w.rnd.IntN(4)) * mib
	case n == 3 && !slices.ContainsFunc(w.volumes, func(v *volume) bool { return v.fs == "xfs" }):
		return "xfs", 300 * mib
	}
	return "ext4", int64(16+w.rnd.IntN(16)) * mib
}

func (w *worker) create(ctx context.Context) (bool, error) {
	if !w.room() {
		return false, nil
	}
	fs, size := w.kind()
	v, err := w.make(ctx, w.domain(), fs, size, nil)
	if err != nil {
		return true, err
	}
	v.h = &history{}
	return true, nil
}

// forsake asks for a volume and does not wait for the answer.
func (w *worker) forsake(ctx context.Context) (bool, error) {
	w.next++
	name, key := fmt.Sprintf("w%d-%d", w.id, w.next), ""
	key = "volume " + name
	w.l.put(key, entry{phase: asked, most: 4 * mib})
	impatient, cancel := context.WithTimeout(ctx, time.Duration(w.rnd.IntN(30))*time.Millisecond)
	defer cancel()
	_, err := w.q.CreateVolume(impatient, createRequest(name, w.domain(), "", 4*mib, nil))
	if err != nil && !mayRun(err) {
		return true, err
	}
	w.l.move(key, forsaken)
	return true, nil
}

// grown is a size that is the source's, or larger.
func (w *worker) grown(size int64) int64 {
	return size + int64(w.rnd.IntN(2)*w.rnd.IntN(8))*mib
}

func (w *worker) restore(ctx context.Context) (bool, error) {
	if len(w.snapshots) == 0 || !w.room() {
		return false, nil
	}
	_, err := w.restoreOf(ctx, w.snapshots[w.rnd.IntN(len(w.snapshots))])
	return true, err
}

func fromSnapshot(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}

// restoreOf makes a volume of a snapshot, anywhere, and compares its bytes.
func (w *worker) restoreOf(ctx context.Context, s *snapshot) (*volume, error) {
	v, err := w.make(ctx, w.domain(), s.fs, w.grown(s.size), fromSnapshot(s.id))
	if err != nil {
		return nil, err
	}
	c, err := w.look(ctx, v)
	if err == nil {
		err = s.m.narrow(c)
	}
	if err != nil {
		return nil, fmt.Errorf("volume %s restored in %s from snapshot %s of %s: %w", v.id, v.domain, s.id, s.domain, err)
	}
	v.h = s.m.resumed()
	return v, s.groupIsOneMoment()
}

// look mounts a volume, reads it, and leaves it mounted without a writer.
func (w *worker) look(ctx context.Context, v *volume) (c content, err error) {
	if err := w.mount(ctx, v); err != nil {
		return c, err
	}
	p, err := openPlace(v.target, v.fs == "")
	if err != nil {
		return c, err
	}
	c, err = p.read()
	return c, errors.Join(err, p.close())
}

func (w *worker) clone(ctx context.Context) (bool, error) {
	if !w.room() {
		return false, nil
	}
	v := w.pick(cuttable)
	if v == nil {
		return false, nil
	}
	m := v.h.now()
	source := &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: v.id}}}
	domain := w.domain()
	if v.target != "" && domain != v.domain && v.domain == "plain" && v.fs == "" {
		domain = v.domain
	}
	c, err := w.make(ctx, domain, v.fs, w.grown(v.size), source)
	if err != nil {
		return true, err
	}
	v.h.cutBy(&m)
	have, err := w.look(ctx, c)
	if err == nil {
		err = m.narrow(have)
	}
	if err != nil {
		return true, fmt.Errorf("volume %s cloned in %s from volume %s of %s: %w", c.id, c.domain, v.id, v.domain, err)
	}
	c.h = m.resumed()
	return true, nil
}

// cuttable: a raw block device in use needs a native snapshot.
func cuttable(v *volume) bool { return v.target == "" || v.fs != "" || v.domain == "native" }

// freezable: members of a group stand still together.
func freezable(v *volume) bool { return v.target == "" || v.fs != "" }

func (w *worker) pick(ok func(*volume) bool) *volume {
	var some []*volume
	for _, v := range w.volumes {
		if ok(v) {
			some = append(some, v)
		}
	}
	if len(some) == 0 {
		return nil
	}
	return some[w.rnd.IntN(len(some))]
}

func (w *worker) snapshot(ctx context.Context) (bool, error) {
	v := w.pick(cuttable)
	if v == nil || len(w.snapshots) >= mostSnapshots {
		return false, nil
	}
	s := &snapshot{name: w.name(), domain: v.domain, fs: v.fs, size: v.size, m: v.h.now()}
	key := "snapshot " + s.name
	w.l.put(key, entry{phase: asked, snapshot: true})
	reply, err := cut(ctx, w.q.CreateSnapshot, &csi.CreateSnapshotRequest{SourceVolumeId: v.id, Name: s.name})
	if err != nil {
		return true, fmt.Errorf("snapshot %s of %s: %w", s.name, v.id, err)
	}
	v.h.cutBy(&s.m)
	got := reply.GetSnapshot()
	s.id = got.GetSnapshotId()
	if got.GetSizeBytes() != v.size || got.GetSourceVolumeId() != v.id || !got.GetReadyToUse() {
		return true, fmt.Errorf("snapshot %s of %s (%d bytes) is answered as %v", s.name, v.id, v.size, got)
	}
	w.l.put(key, entry{phase: there, handle: s.id, size: s.size, most: s.size, snapshot: true})
	w.snapshots = append(w.snapshots, s)
	return true, nil
}

// cut makes a call that may find the filesystem frozen for too long on a busy
// machine, which is refused, and repeats it then as well.
func cut[Q, A any](ctx context.Context, method func(context.Context, Q, ...grpc.CallOption) (A, error), request Q) (A, error) {
	for try := 0; ; try++ {
		reply, err := call(ctx, method, request)
		if status.Code(err) != codes.FailedPrecondition || try == 5 {
			return reply, err
		}
	}
}

func (w *worker) groupSnapshot(ctx context.Context) (bool, error) {
	if len(w.snapshots)+2 > mostSnapshots {
		return false, nil
	}
	first := w.pick(freezable)
	if first == nil {
		return false, nil
	}
	second := w.pick(func(v *volume) bool { return v != first && v.domain == first.domain && freezable(v) })
	if second == nil {
		return false, nil
	}
	g := &group{name: w.name()}
	request := &csi.CreateVolumeGroupSnapshotRequest{Name: g.name}
	by := map[string]*snapshot{}
	sizes := map[string]int64{}
	for _, v := range []*volume{first, second} {
		s := &snapshot{domain: v.domain, fs: v.fs, size: v.size, m: v.h.now(), group: g}
		by[v.id], sizes[v.id] = s, v.size
		request.SourceVolumeIds = append(request.SourceVolumeIds, v.id)
		w.l.put("member of "+v.id, entry{phase: asked, snapshot: true})
	}
	reply, err := cut(ctx, w.q.CreateVolumeGroupSnapshot, request)
	if err != nil {
		return true, fmt.Errorf("group snapshot %s of %s and %s: %w", g.name, first.id, second.id, err)
	}
	g.id = reply.GetGroupSnapshot().GetGroupSnapshotId()
	for _, v := range []*volume{first, second} {
		v.h.cutBy(&by[v.id].m)
	}
	for _, got := range reply.GetGroupSnapshot().GetSnapshots() {
		s := by[got.GetSourceVolumeId()]
		if s == nil || s.id != "" || got.GetSizeBytes() != sizes[got.GetSourceVolumeId()] || !got.GetReadyToUse() || got.GetGroupSnapshotId() != g.id {
			return true, fmt.Errorf("group snapshot %s is answered with the member %v", g.name, got)
		}
		s.id, s.name = got.GetSnapshotId(), "member "+got.GetSnapshotId()
		w.l.put(s.name, entry{phase: there, handle: s.id, size: s.size, most: s.size, snapshot: true})
		g.members = append(g.members, s)
	}
	if len(g.members) != 2 {
		return true, fmt.Errorf("group snapshot %s is answered with %d members", g.name, len(g.members))
	}
	for _, v := range []*volume{first, second} {
		w.l.put("member of "+v.id, entry{phase: left})
	}
	w.snapshots = append(w.snapshots, g.members...)
	return true, nil
}

// groupIsOneMoment compares the times of the writes that the members show, once
// all are known: there must have been a moment at which all were so.
func (s *snapshot) groupIsOneMoment() error {
	if s.group == nil {
		return nil
	}
	var latest, earliest time.Time // the moment lies between
	for _, one := range s.group.members {
		if one.m.low != one.m.high {
			return nil
		}
		k := one.m.low
		if k > 0 && one.m.writes[k-1].begin.After(latest) {
			latest = one.m.writes[k-1].begin
		}
		if k < len(one.m.writes) && !one.m.writes[k].end.IsZero() && (earliest.IsZero() || one.m.writes[k].end.Before(earliest)) {
			earliest = one.m.writes[k].end
		}
	}
	if !earliest.IsZero() && latest.After(earliest) {
		return fmt.Errorf("group snapshot %s is not one moment: one member shows a write begun at %s, another lacks one acknowledged at %s",
			s.group.id, latest.Format(time.RFC3339Nano), earliest.Format(time.RFC3339Nano))
	}
	return nil
}

func (w *worker) mountOne(ctx context.Context) (bool, error) {
	v := w.pick(func(v *volume) bool { return v.w == nil })
	if v == nil {
		return false, nil
	}
	return true, w.open(ctx, v)
}

// open mounts a volume, compares it with what was acknowledged, and writes on.
func (w *worker) open(ctx context.Context, v *volume) error {
	if v.h == nil { // the step that made it failed
		return fmt.Errorf("volume %s has no history", v.id)
	}
	m := v.h.now()
	v.h.cutBy(&m)
	c, err := w.look(ctx, v)
	if err == nil {
		err = m.narrow(c)
	}
	if err != nil {
		return fmt.Errorf("volume %s in %s: %w", v.id, v.domain, err)
	}
	p, err := openPlace(v.target, v.fs == "")
	if err != nil {
		return err
	}
	v.w = startWriter(v.id, p, v.h, rand.New(rand.NewPCG(w.rnd.Uint64(), w.rnd.Uint64())))
	w.active.set(v.w, true)
	return nil
}

// mount does what the attacher and the kubelet do.
func (w *worker) mount(ctx context.Context, v *volume) error {
	published, err := call(ctx, w.q.ControllerPublishVolume, &csi.ControllerPublishVolumeRequest{
		VolumeId: v.id, NodeId: nodeName, VolumeCapability: capability(v.fs)})
	if err != nil {
		return fmt.Errorf("attach %s: %w", v.id, err)
	}
	v.node = published.GetPublishContext()
	v.staging = filepath.Join(w.q.kubelet, "plugins", v.name, "globalmount")
	pod := filepath.Join(w.q.kubelet, "pods", v.name)
	for _, dir := range []string{v.staging, pod} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if _, err := call(ctx, w.q.NodeStageVolume, &csi.NodeStageVolumeRequest{VolumeId: v.id, PublishContext: v.node,
		StagingTargetPath: v.staging, VolumeCapability: capability(v.fs)}); err != nil {
		return fmt.Errorf("stage %s: %w", v.id, err)
	}
	target := filepath.Join(pod, "target")
	if _, err := call(ctx, w.q.NodePublishVolume, &csi.NodePublishVolumeRequest{VolumeId: v.id, PublishContext: v.node,
		StagingTargetPath: v.staging, TargetPath: target, VolumeCapability: capability(v.fs)}); err != nil {
		return fmt.Errorf("publish %s: %w", v.id, err)
	}
	v.target = target
	return v.hasSize()
}

// hasSize compares what a workload sees with what was acknowledged.
func (v *volume) hasSize() error {
	if v.fs != "" {
		var st unix.Statfs_t
		if err := unix.Statfs(v.target, &st); err != nil {
			return err
		}
		// What the filesystem needs for itself is not counted: XFS's log alone is 64 MiB.
		if total := int64(st.Blocks) * st.Bsize; total > v.size || v.fs == "ext4" && total < v.size/2 || total < v.size-100*mib {
			return fmt.Errorf("volume %s has %d bytes and its filesystem %d", v.id, v.size, total)
		}
		return nil
	}
	f, err := os.Open(v.target)
	if err != nil {
		return err
	}
	defer f.Close()
	if size, err := f.Seek(0, io.SeekEnd); err != nil || size != v.size {
		return fmt.Errorf("volume %s has %d bytes and its device %d, error %v", v.id, v.size, size, err)
	}
	return nil
}

func (w *worker) unmountOne(ctx context.Context) (bool, error) {
	v := w.pick(func(v *volume) bool { return v.target != "" })
	if v == nil {
		return false, nil
	}
	return true, w.unmount(ctx, v)
}

// unmount stops the writer and does the reverse of mount.
func (w *worker) unmount(ctx context.Context, v *volume) error {
	if v.w != nil {
		err := v.w.finish()
		w.active.set(v.w, false)
		v.w = nil
		if err != nil {
			return err
		}
	}
	if v.target == "" {
		return nil
	}
	if _, err := call(ctx, w.q.NodeUnpublishVolume, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target}); err != nil {
		return fmt.Errorf("unpublish %s: %w", v.id, err)
	}
	v.target = ""
	if _, err := call(ctx, w.q.NodeUnstageVolume, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging}); err != nil {
		return fmt.Errorf("unstage %s: %w", v.id, err)
	}
	if _, err := call(ctx, w.q.ControllerUnpublishVolume, &csi.ControllerUnpublishVolumeRequest{VolumeId: v.id, NodeId: nodeName}); err != nil {
		return fmt.Errorf("detach %s: %w", v.id, err)
	}
	return nil
}

func (w *worker) expand(ctx context.Context) (bool, error) {
	v := w.pick(func(v *volume) bool { return v.size < 400*mib })
	if v == nil {
		return false, nil
	}
	if v.fs == "ext4" && v.target != "" && !mayGrowExt4() {
		if err := w.unmount(ctx, v); err != nil {
			return true, err
		}
	}
	size := v.size + int64(1+w.rnd.IntN(8))*mib
	key := "volume " + v.name
	w.l.put(key, entry{phase: there, handle: v.id, size: v.size, most: size})
	reply, err := call(ctx, w.q.ControllerExpandVolume, &csi.ControllerExpandVolumeRequest{VolumeId: v.id,
		CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapability: capability(v.fs)})
	if err != nil {
		return true, fmt.Errorf("expand %s: %w", v.id, err)
	}
	if reply.GetCapacityBytes() != size {
		return true, fmt.Errorf("%s was expanded to %d bytes, asked for were %d", v.id, reply.GetCapacityBytes(), size)
	}
	v.size = size
	w.l.put(key, entry{phase: there, handle: v.id, size: size, most: size})
	if v.target == "" {
		return true, nil // grown when it is staged
	}
	if _, err := call(ctx, w.q.NodeExpandVolume, &csi.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: v.target,
		StagingTargetPath: v.staging, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapability: capability(v.fs)}); err != nil {
		return true, fmt.Errorf("expand %s on its node: %w", v.id, err)
	}
	return true, v.hasSize()
}

// mayGrowExt4 says whether this process may grow a mounted ext4, which root in
// some containers may not.
func mayGrowExt4() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData // of 32 capabilities each
	return unix.Capget(&header, &sets[0]) == nil && sets[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

func (w *worker) deleteVolume(ctx context.Context) (bool, error) {
	if len(w.volumes) == 0 {
		return false, nil
	}
	return true, w.removeVolume(ctx, w.volumes[w.rnd.IntN(len(w.volumes))])
}

func (w *worker) removeVolume(ctx context.Context, v *volume) error {
	if err := w.unmount(ctx, v); err != nil {
		return err
	}
	w.l.move("volume "+v.name, leaving)
	if _, err := call(ctx, w.q.DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: v.id}); err != nil {
		return fmt.Errorf("delete %s: %w", v.id, err)
	}
	w.l.move("volume "+v.name, left)
	w.volumes = slices.DeleteFunc(w.volumes, func(o *volume) bool { return o == v })
	w.free = append(w.free, v.name)
	return nil
}

func (w *worker) deleteSnapshot(ctx context.Context) (bool, error) {
	if len(w.snapshots) == 0 {
		return false, nil
	}
	return true, w.removeSnapshot(ctx, w.snapshots[w.rnd.IntN(len(w.snapshots))])
}

func (w *worker) removeSnapshot(ctx context.Context, s *snapshot) error {
	if s.group == nil {
		w.l.move("snapshot "+s.name, leaving)
		if _, err := call(ctx, w.q.DeleteSnapshot, &csi.DeleteSnapshotRequest{SnapshotId: s.id}); err != nil {
			return fmt.Errorf("delete snapshot %s: %w", s.id, err)
		}
		w.l.move("snapshot "+s.name, left)
		w.snapshots = slices.DeleteFunc(w.snapshots, func(o *snapshot) bool { return o == s })
		w.free = append(w.free, s.name)
		return nil
	}
	request := &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: s.group.id}
	for _, one := range s.group.members {
		w.l.move(one.name, leaving)
		request.SnapshotIds = append(request.SnapshotIds, one.id)
	}
	if _, err := call(ctx, w.q.DeleteVolumeGroupSnapshot, request); err != nil {
		return fmt.Errorf("delete group snapshot %s: %w", s.group.id, err)
	}
	for _, one := range s.group.members {
		w.l.move(one.name, left)
	}
	w.snapshots = slices.DeleteFunc(w.snapshots, func(o *snapshot) bool { return o.group == s.group })
	return nil
}

// finish compares every volume and every snapshot for the last time and deletes
// all, in an order of chance.
func (w *worker) finish(ctx context.Context) error {
	for _, v := range slices.Clone(w.volumes) {
		if err := w.unmount(ctx, v); err != nil {
			return err
		}
		if err := w.open(ctx, v); err != nil {
			return err
		}
	}
	for _, s := range slices.Clone(w.snapshots) {
		if _, err := w.restoreOf(ctx, s); err != nil {
			return err
		}
	}
	for len(w.volumes)+len(w.snapshots) > 0 {
		one := w.deleteVolume
		if w.rnd.IntN(len(w.volumes)+len(w.snapshots)) >= len(w.volumes) {
			one = w.deleteSnapshot
		}
		if _, err := one(ctx); err != nil {
			return err
		}
	}
	return nil
}
