package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/test/lab"
	"github.com/quarry-csi/quarry/test/process"
)

// span is a part of a volume, in bytes.
type span struct{ offset, length int64 }

// picture is what a volume holds: 4 KiB blocks, each full of one number, zeros elsewhere.
type picture map[int64]uint64

const pictureBlock = 4096

func (p picture) spans() []span {
	var offsets []int64
	for block := range p {
		offsets = append(offsets, block*pictureBlock)
	}
	slices.Sort(offsets)
	var out []span
	for _, o := range offsets {
		if n := len(out); n > 0 && out[n-1].offset+out[n-1].length == o {
			out[n-1].length += pictureBlock
		} else {
			out = append(out, span{o, pictureBlock})
		}
	}
	return out
}

// chunks are all blocks of the chunks of layers that the picture touches: what a layer has allocated.
func (p picture) chunks() picture {
	const blocks = 32 << 10 / pictureBlock
	out := picture{}
	for b := range p {
		for i := range int64(blocks) {
			out[b/blocks*blocks+i] = 1
		}
	}
	return out
}

func (p picture) with(other picture) picture {
	out := maps.Clone(p)
	maps.Copy(out, other)
	return out
}

func number(n uint64) []byte { return bytes.Repeat(fmt.Appendf(nil, "%016x", n), pictureBlock/16) }

// scribble writes n pieces of length bytes at random places of a device, so that
// they are durable, and enters them into the pictures.
func scribble(t *testing.T, path string, size int64, n int, length int64, seed uint64, into ...picture) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(seed, 1))
	for range n {
		first := rnd.Int64N(size/pictureBlock - length/pictureBlock + 1)
		for block := first; block < first+length/pictureBlock; block++ {
			value := rnd.Uint64() | 1
			for _, p := range into {
				p[block] = value
			}
			if _, err := f.WriteAt(number(value), block*pictureBlock); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// user is who makes CSI calls of a running quarry.
type user struct {
	t *testing.T
	*process.Quarry
}

const labNode = "n1"

func newUser(t *testing.T, domains ...string) *user {
	t.Helper()
	lab.Need(t)
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(asQuarry, "1")
	dir, err := os.MkdirTemp("", "q-") // short, because the path of a socket may have 107 bytes only
	if err != nil {
		t.Fatal(err)
	}
	q, err := process.New(process.Config{Binary: program, Dir: dir, Domains: process.DomainsFile(domains...), Node: labNode, Installation: "lab"})
	if err == nil {
		err = q.Start(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of quarry's log:\n%s", q.LastLog(60))
		}
		if err := errors.Join(q.Stop(context.Background()), q.Close(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	return &user{t, q}
}

// ask makes a call, again while the answer means "may still be running".
func ask[Q, A any](u *user, method func(context.Context, Q, ...grpc.CallOption) (A, error), request Q) A {
	u.t.Helper()
	for {
		reply, err := method(u.t.Context(), request)
		switch status.Code(err) {
		case codes.OK:
			return reply
		case codes.Aborted, codes.Unavailable, codes.DeadlineExceeded:
		default:
			u.t.Fatalf("%T: %v", request, err)
		}
		select {
		case <-u.t.Context().Done():
			u.t.Fatalf("%T: %v", request, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func rawBlock() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

// volume makes a raw block volume, of a snapshot or empty, and publishes it.
func (u *user) volume(domain, name string, size int64, snapshot string) (id, path string) {
	u.t.Helper()
	req := &csi.CreateVolumeRequest{Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size},
		VolumeCapabilities: []*csi.VolumeCapability{rawBlock()}, Parameters: map[string]string{"domain": domain}}
	if snapshot != "" {
		req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}}
	}
	id = ask(u, u.CreateVolume, req).GetVolume().GetVolumeId()
	context := ask(u, u.ControllerPublishVolume, &csi.ControllerPublishVolumeRequest{VolumeId: id, NodeId: labNode, VolumeCapability: rawBlock()}).GetPublishContext()
	staging, path := filepath.Join(u.Kubelet(), name, "staging"), filepath.Join(u.Kubelet(), name, "device")
	if err := os.MkdirAll(staging, 0o755); err != nil {
		u.t.Fatal(err)
	}
	ask(u, u.NodeStageVolume, &csi.NodeStageVolumeRequest{VolumeId: id, PublishContext: context, StagingTargetPath: staging, VolumeCapability: rawBlock()})
	ask(u, u.NodePublishVolume, &csi.NodePublishVolumeRequest{VolumeId: id, StagingTargetPath: staging, TargetPath: path, VolumeCapability: rawBlock()})
	return id, path
}

// remove takes a volume out of use, and deletes it.
func (u *user) remove(id, path string) {
	u.t.Helper()
	ask(u, u.NodeUnpublishVolume, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: path})
	ask(u, u.NodeUnstageVolume, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: filepath.Join(filepath.Dir(path), "staging")})
	ask(u, u.ControllerUnpublishVolume, &csi.ControllerUnpublishVolumeRequest{VolumeId: id, NodeId: labNode})
	ask(u, u.DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: id})
}

func (u *user) snapshot(volume, name string) string {
	u.t.Helper()
	return ask(u, u.CreateSnapshot, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: volume}).GetSnapshot().GetSnapshotId()
}

// allocated lists what the service says, from an offset on.
func (u *user) allocated(snapshot string, from int64) ([]span, error) {
	return drain(u, u.GetMetadataAllocated, &csi.GetMetadataAllocatedRequest{SnapshotId: snapshot, StartingOffset: from},
		(csi.SnapshotMetadata_GetMetadataAllocatedClient).Recv)
}

// delta does so with what changed.
func (u *user) delta(base, target string, from int64, most int32) ([]span, error) {
	return drain(u, u.GetMetadataDelta, &csi.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: target, StartingOffset: from, MaxResults: most},
		(csi.SnapshotMetadata_GetMetadataDeltaClient).Recv)
}

// drain takes all of a stream, and asks again while the answer means "not now".
func drain[Q, S any, M interface{ GetBlockMetadata() []*csi.BlockMetadata }](u *user, method func(context.Context, Q, ...grpc.CallOption) (S, error), request Q, next func(S) (M, error)) ([]span, error) {
	for {
		var out []span
		stream, err := method(u.t.Context(), request)
		for err == nil {
			var m M
			if m, err = next(stream); err == nil {
				for _, b := range m.GetBlockMetadata() {
					out = append(out, span{b.GetByteOffset(), b.GetSizeBytes()})
				}
			}
		}
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if c := status.Code(err); c != codes.Aborted && c != codes.Unavailable || u.t.Context().Err() != nil {
			return nil, err
		}
		u.t.Logf("not now: %v", err)
	}
}

// exactly compares what was listed with what a picture holds.
func exactly(t *testing.T, what string, got []span, err error, want picture) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if w := want.spans(); !slices.Equal(got, w) {
		t.Fatalf("%s: %d ranges were listed, %d written; the first of each: %v, %v", what, len(got), len(w), got[:min(5, len(got))], w[:min(5, len(w))])
	}
}

// transplant copies parts of one device to another.
func transplant(t *testing.T, from, to string, parts []span) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range parts {
		if _, err := io.Copy(io.NewOffsetWriter(out, p.offset), io.NewSectionReader(in, p.offset, p.length)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(out.Sync(), out.Close()); err != nil {
		t.Fatal(err)
	}
}

// holds reads a whole device, past the page cache, and compares it with a picture.
func holds(t *testing.T, path string, size int64, want picture) {
	t.Helper()
	const step = 4 << 20
	var g errgroup.Group
	g.SetLimit(2)
	zeros := make([]byte, step)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for off := int64(0); off < size; off += step {
		g.Go(func() error {
			b, err := unix.Mmap(-1, 0, step, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned
			if err != nil {
				return err
			}
			defer func() { _ = unix.Munmap(b) }()
			n, err := unix.Pread(fd, b, off)
			if err != nil || n < int(min(step, size-off)) {
				return fmt.Errorf("read %d at %d: %w", n, off, err)
			}
			for i := 0; i < n; i += pictureBlock {
				block, value := b[i:i+pictureBlock], zeros[:pictureBlock]
				if v, ok := want[(off+int64(i))/pictureBlock]; ok {
					value = number(v)
				}
				if !bytes.Equal(block, value) {
					return fmt.Errorf("block %d begins with %q, want %q", (off+int64(i))/pictureBlock, block[:16], value[:16])
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Errorf("%s: %v", path, err)
	}
}

func TestChangedBlocksOfATenGibibyteImageAreListedExactly(t *testing.T) {
	lab.Need(t)
	size, part := int64(10<<30), 1
	if testing.Short() { // a tenth of all
		size, part = 1<<30, 10
	}
	storage := hosttest.Filesystem(t, "ext4", 200<<30)
	u := newUser(t, process.Domain("local", storage, ""))
	id, path := u.volume("local", "v", size, "")
	base, now := picture{}, picture{}
	scribble(t, path, size, 500/part, 128<<10, 1, base, now)
	s1 := u.snapshot(id, "s1")
	first := picture{}
	scribble(t, path, size, 12800/part, 4<<10, 2, first, now) // half a percent, and another below
	s2 := u.snapshot(id, "s2")
	both := picture{}
	for b, v := range first {
		both[b] = v
	}
	second := picture{}
	scribble(t, path, size, 800/part, 64<<10, 3, second, both, now) // in larger pieces: a merge takes a flush for each
	s3 := u.snapshot(id, "s3")
	scribble(t, path, size, 100, 64<<10, 4) // after the last cut: nobody's
	t.Logf("the volume holds %d blocks; %d changed (%.2f %%)", len(now), len(both), float64(len(both))*pictureBlock*100/float64(size))

	for _, c := range []struct {
		what, base, target string
		want               picture
	}{{"s1 to s2", s1, s2, first}, {"s2 to s3", s2, s3, second}, {"s1 to s3", s1, s3, both}} {
		began := time.Now()
		got, err := u.delta(c.base, c.target, 0, 0)
		exactly(t, c.what, got, err, c.want)
		t.Logf("%s: %d ranges in %s", c.what, len(got), time.Since(began))
	}
	got, err := u.allocated(s1, 0)
	exactly(t, "allocated in s1", got, err, base)
	got, err = u.allocated(s3, 0)
	exactly(t, "allocated in s3", got, err, base.with(both.chunks()))

	// Broken off and resumed.
	whole := both.spans()
	half := whole[len(whole)/2]
	got, err = u.delta(s1, s3, half.offset+half.length, 7)
	if err != nil || !slices.Equal(got, whole[len(whole)/2+1:]) {
		t.Errorf("resumed: %d ranges, %v; want %d", len(got), err, len(whole)-len(whole)/2-1)
	}

	// Deleting the one in between merges its layer; what changed stays the same.
	ask(u, u.DeleteSnapshot, &csi.DeleteSnapshotRequest{SnapshotId: s2})
	if _, err := u.delta(s2, s3, 0, 0); status.Code(err) != codes.NotFound {
		t.Errorf("a deleted base: %v", err)
	}
	for range 10 {
		got, err = u.delta(s1, s3, 0, 0)
		exactly(t, "s1 to s3 during the merge", got, err, both)
	}
	t.Log("the layer that nobody needs is being merged")
	limit := time.After(5 * time.Minute)
	for slabs := 4; slabs > 3; { // of s1, of s2, of s3, of the volume
		entries, err := os.ReadDir(filepath.Join(storage, "slabs"))
		if err != nil {
			t.Fatal(err)
		}
		slabs = len(entries)
		select {
		case <-limit:
			t.Fatalf("it is not merged: %v", entries)
		case <-time.After(50 * time.Millisecond):
		}
	}
	t.Log("it is merged")
	got, err = u.delta(s1, s3, 0, 0)
	exactly(t, "s1 to s3 after the merge", got, err, both)

	// Base plus deltas is the snapshot.
	t.Log("restoring")
	fromTarget, target := u.volume("local", "target", size, s3)
	fromBase, restored := u.volume("local", "restored", size, s1)
	holds(t, restored, size, base)
	transplant(t, target, restored, got)
	holds(t, restored, size, now)
	holds(t, target, size, now)

	u.remove(fromTarget, target)
	u.remove(fromBase, restored)
	u.remove(id, path)
}

// A snapshot in one domain and one of a copy of it in another are not in one chain.
func TestALayeredSnapshotIsComparedWithOneInAnotherDomain(t *testing.T) {
	lab.Need(t)
	const size = int64(64 << 20)
	u := newUser(t, process.Domain("a", hosttest.Filesystem(t, "ext4", 2<<30), ""), process.Domain("b", hosttest.Filesystem(t, "ext4", 2<<30), ""))
	id, path := u.volume("a", "v", size, "")
	scribble(t, path, size, 20, 64<<10, 1)
	u.snapshot(id, "s1")
	scribble(t, path, size, 20, 64<<10, 2)
	s2 := u.snapshot(id, "s2") // a layer over s1
	scribble(t, path, size, 20, 64<<10, 3)

	moved, there := u.volume("b", "w", size, s2)
	changed := picture{}
	scribble(t, there, size, 30, 12<<10, 4, changed)
	w1 := u.snapshot(moved, "w1")
	got, err := u.delta(s2, w1, 0, 0)
	exactly(t, "s2 to its copy's snapshot", got, err, changed)
	if _, err := u.delta(w1, s2, 0, 0); status.Code(err) != codes.InvalidArgument {
		t.Errorf("the other way round: %v", err)
	}
	u.remove(moved, there)
	u.remove(id, path)
}
