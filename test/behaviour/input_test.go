package behaviour

import (
	"context"
	"maps"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	quarrycsi "github.com/quarry-csi/quarry/pkg/csi"
)

// once makes a call that is not repeated.
func once() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 30*time.Second)
}

// callsOn are the calls that need an existing volume, each once.
func callsOn(r *rig, v *volume) map[string]func() error {
	path := filepath.Join(r.Kubelet(), "some", "where")
	return map[string]func() error{
		"CreateSnapshot": func() error {
			ctx, cancel := once()
			defer cancel()
			_, err := r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "of-none", SourceVolumeId: v.id})
			return err
		},
		"ControllerPublish": func() error {
			ctx, cancel := once()
			defer cancel()
			_, err := r.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{VolumeId: v.id, NodeId: nodeID, VolumeCapability: v.cap})
			return err
		},
		"ControllerExpand": func() error {
			ctx, cancel := once()
			defer cancel()
			_, err := r.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: v.id, CapacityRange: &csi.CapacityRange{RequiredBytes: 64 * mib}})
			return err
		},
		"ControllerGetVolume": func() error {
			ctx, cancel := once()
			defer cancel()
			_, err := r.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: v.id})
			return err
		},
		"Clone": func() error {
			ctx, cancel := once()
			defer cancel()
			req := creation(r.places[0].name, "of-none", 16*mib, v.cap)
			req.VolumeContentSource = fromVolume(v.id)
			_, err := r.CreateVolume(ctx, req)
			return err
		},
		"NodeStage": func() error {
			ctx, cancel := once()
			defer cancel()
			_, err := r.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: v.id, StagingTargetPath: path, VolumeCapability: v.cap,
				PublishContext: map[string]string{quarrycsi.GenerationKey: "1"}})
			return err
		},
	}
}

// untouched runs do and checks that it changed no domain and that the volumes
// beside work.
func untouched(t *testing.T, r *rig, beside []*volume, do func()) {
	t.Helper()
	var before [][]string
	for _, p := range r.places {
		before = append(before, content(t, p, "slabs", "tags", "tmp", "trash"))
	}
	do()
	for i, p := range r.places {
		if err := same(before[i], content(t, p, "slabs", "tags", "tmp", "trash")); err != nil {
			t.Errorf("domain %s changed: %v", p.name, err)
		}
	}
	for _, v := range beside {
		v.works()
	}
}

func TestBadRequestsAreRefusedPreciselyAndChangeNothing(t *testing.T) {
	one, two := on(t, "one", "ext4", 256*mib), on(t, "two", "xfs", 320*mib)
	r := newRig(t, one, two)
	v, w := r.volume("one", "v", 16*mib, filesystem("ext4")), r.volume("two", "w", 16*mib, filesystem("ext4"))

	type refused struct {
		code codes.Code
		says []string
	}
	creations := map[string]struct {
		change func(*csi.CreateVolumeRequest)
		refused
	}{
		"unknown domain":      {func(q *csi.CreateVolumeRequest) { q.Parameters["domain"] = "nirvana" }, refused{codes.InvalidArgument, []string{"nirvana", "one", "two"}}},
		"unknown parameter":   {func(q *csi.CreateVolumeRequest) { q.Parameters["colour"] = "red" }, refused{codes.InvalidArgument, []string{`"colour"`, "known", "layout"}}},
		"unknown mutable":     {func(q *csi.CreateVolumeRequest) { q.MutableParameters = map[string]string{"colour": "red"} }, refused{codes.InvalidArgument, []string{`"colour"`, "quiesceLimit"}}},
		"bad value":           {func(q *csi.CreateVolumeRequest) { q.Parameters["quiesceLimit"] = "soon" }, refused{codes.InvalidArgument, []string{"quiesceLimit", "soon", "10s"}}},
		"unknown layout":      {func(q *csi.CreateVolumeRequest) { q.Parameters["layout"] = "spiral" }, refused{codes.InvalidArgument, []string{"layout", `"spiral"`, "image", "directory"}}},
		"unknown file system": {func(q *csi.CreateVolumeRequest) { q.VolumeCapabilities = []*csi.VolumeCapability{filesystem("ntfs")} }, refused{codes.InvalidArgument, []string{`ntfs`, "ext4", "xfs", "btrfs"}}},
		"mode of an image":    {func(q *csi.CreateVolumeRequest) { q.Parameters["mode"] = "0777" }, refused{codes.InvalidArgument, []string{`"mode"`, `"image"`, `"directory"`}}},
		"mode that is none": {func(q *csi.CreateVolumeRequest) {
			q.Parameters["mode"], q.Parameters["layout"], q.VolumeCapabilities = "rwx", "directory", []*csi.VolumeCapability{filesystem("")}
		}, refused{codes.InvalidArgument, []string{`"mode"`, `"rwx"`, "octal"}}},
		"native that is not":     {func(q *csi.CreateVolumeRequest) { q.Parameters["requireNative"] = "snapshot" }, refused{codes.InvalidArgument, []string{"snapshot", "one"}}},
		"native that is unknown": {func(q *csi.CreateVolumeRequest) { q.Parameters["requireNative"] = "magic" }, refused{codes.InvalidArgument, []string{"requireNative", "magic"}}},
		"no capability":          {func(q *csi.CreateVolumeRequest) { q.VolumeCapabilities = nil }, refused{codes.InvalidArgument, []string{"volume_capabilities"}}},

		"below the minimum, with limit": {func(q *csi.CreateVolumeRequest) {
			q.VolumeCapabilities = []*csi.VolumeCapability{filesystem("xfs")}
			q.CapacityRange = &csi.CapacityRange{RequiredBytes: 16 * mib, LimitBytes: 32 * mib}
		}, refused{codes.OutOfRange, []string{"xfs", "300 MiB", "32 MiB"}}},
		"limit below required": {func(q *csi.CreateVolumeRequest) {
			q.CapacityRange = &csi.CapacityRange{RequiredBytes: 16 * mib, LimitBytes: 8 * mib}
		}, refused{codes.OutOfRange, []string{"limit_bytes", "required_bytes"}}},
		"above the free space": {func(q *csi.CreateVolumeRequest) { q.CapacityRange.RequiredBytes = 1 << 40 }, refused{codes.ResourceExhausted, []string{"one", "1 TiB"}}},
		"negative":             {func(q *csi.CreateVolumeRequest) { q.CapacityRange.RequiredBytes = -1 }, refused{codes.InvalidArgument, []string{"required_bytes", "-1"}}},
		"negative limit":       {func(q *csi.CreateVolumeRequest) { q.CapacityRange.LimitBytes = -1 }, refused{codes.InvalidArgument, []string{"limit_bytes", "-1"}}},
		"overflowing":          {func(q *csi.CreateVolumeRequest) { q.CapacityRange.RequiredBytes = math.MaxInt64 }, refused{codes.OutOfRange, []string{"required_bytes", "at most"}}},
		"larger than a file":   {func(q *csi.CreateVolumeRequest) { q.CapacityRange.RequiredBytes = 1 << 60 }, refused{codes.OutOfRange, []string{"1152921504606846976"}}},

		"no name":                {func(q *csi.CreateVolumeRequest) { q.Name = "" }, refused{codes.InvalidArgument, []string{"name"}}},
		"name of 129 bytes":      {func(q *csi.CreateVolumeRequest) { q.Name = strings.Repeat("n", 129) }, refused{codes.InvalidArgument, []string{"name", "129", "128"}}},
		"control character":      {func(q *csi.CreateVolumeRequest) { q.Name = "bell\a" }, refused{codes.InvalidArgument, []string{"name", "U+0007", "byte 4"}}},
		"NUL":                    {func(q *csi.CreateVolumeRequest) { q.Name = "a\x00b" }, refused{codes.InvalidArgument, []string{"U+0000"}}},
		"name taken, other size": {func(q *csi.CreateVolumeRequest) { q.Name, q.CapacityRange.RequiredBytes = "v", 32*mib }, refused{codes.AlreadyExists, []string{"16777216", "33554432"}}},
	}
	for _, p := range []string{"1", "snapshot"} {
		creations["source that cannot be, "+p] = struct {
			change func(*csi.CreateVolumeRequest)
			refused
		}{func(q *csi.CreateVolumeRequest) { q.VolumeContentSource = fromSnapshot(p) }, refused{codes.NotFound, []string{"snapshot_id", p}}}
	}
	creations["smaller than its source"] = struct {
		change func(*csi.CreateVolumeRequest)
		refused
	}{func(q *csi.CreateVolumeRequest) {
		q.VolumeContentSource, q.CapacityRange.RequiredBytes, q.CapacityRange.LimitBytes = fromVolume(v.id), mib, 2*mib
	}, refused{codes.OutOfRange, []string{"16"}}}
	untouched(t, r, []*volume{v, w}, func() {
		for name, c := range creations {
			t.Run("CreateVolume/"+name, func(t *testing.T) {
				req := creation("one", "bad", 16*mib, filesystem("ext4"))
				c.change(req)
				ctx, cancel := once()
				defer cancel()
				_, err := r.CreateVolume(ctx, req)
				refusal(t, err, c.code, c.says...)
			})
		}
		for name, c := range map[string]struct {
			bytes, limit int64
			refused
		}{
			"nothing said":         {0, 0, refused{codes.InvalidArgument, []string{"capacity_range", "required_bytes"}}},
			"negative":             {-5, 0, refused{codes.InvalidArgument, []string{"required_bytes", "-5"}}},
			"overflowing":          {math.MaxInt64, 0, refused{codes.OutOfRange, []string{"required_bytes"}}},
			"above the free space": {1 << 40, 0, refused{codes.ResourceExhausted, []string{"one", "from 16 MiB to 1 TiB"}}},
			"shrinking":            {0, mib, refused{codes.OutOfRange, []string{"16777216", "1048576", "never shrink"}}},
		} {
			t.Run("ControllerExpandVolume/"+name, func(t *testing.T) {
				ctx, cancel := once()
				defer cancel()
				_, err := r.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: v.id, CapacityRange: &csi.CapacityRange{RequiredBytes: c.bytes, LimitBytes: c.limit}})
				refusal(t, err, c.code, c.says...)
			})
		}
		for name, req := range map[string]*csi.CreateSnapshotRequest{
			"name":                   {Name: "", SourceVolumeId: v.id},
			"source_volume_id":       {Name: "s"},
			`"colour"`:               {Name: "s", SourceVolumeId: v.id, Parameters: map[string]string{"colour": "red"}},
			"129":                    {Name: strings.Repeat("s", 129), SourceVolumeId: v.id},
			"has no native snapshot": {Name: "s", SourceVolumeId: v.id, Parameters: map[string]string{"requireNative": "snapshot"}},
			"U+001B":                 {Name: "\x1b[31m", SourceVolumeId: v.id},
		} {
			t.Run("CreateSnapshot/"+name, func(t *testing.T) {
				ctx, cancel := once()
				defer cancel()
				_, err := r.CreateSnapshot(ctx, req)
				refusal(t, err, codes.InvalidArgument, name)
			})
		}
	})
}

// Names that look like paths, and odd ones, are names like any others.
func TestOddNamesAreFine(t *testing.T) {
	p := on(t, "one", "ext4", 256*mib)
	r := newRig(t, p)
	before := content(t, p, "slabs")
	for _, name := range []string{
		strings.Repeat("n", 128), strings.Repeat("ü", 64), "../../etc/passwd", "a/b/c", "/", ".", "..", "...", "-rf", "a b", "%s%n", `"'\`, "名前", "🪨", "UPPER", "i.x.1", "tab\there", "~", "con",
	} {
		v := r.volume(p.name, name, mib, filesystem("ext4"))
		again := r.volume(p.name, name, mib, filesystem("ext4"))
		if v.id != again.id {
			t.Errorf("%q: asked again it is %s, not %s", name, again.id, v.id)
		}
		if len(v.id) > 128 {
			t.Errorf("%q: handle %s has %d bytes", name, v.id, len(v.id))
		}
		r.removeSnapshot(r.snapshot(v, name))
		v.remove()
	}
	r.eventually("the slabs to be gone", func() error { return same(before, content(t, p, "slabs")) })
	if entries, err := os.ReadDir(p.path); err != nil {
		t.Error(err)
	} else {
		for _, e := range entries {
			switch e.Name() {
			case "slabs", "tags", "tmp", "trash", "lost+found", "reserve":
			default:
				t.Errorf("%s appeared in the domain", e.Name())
			}
		}
	}
}

func TestHandlesThatCannotBeAreNotFoundAndDeletedAlready(t *testing.T) {
	one, two := on(t, "one", "ext4", 256*mib), on(t, "two", "ext4", 256*mib)
	r := newRig(t, one, two)
	v, w := r.volume("one", "v", 16*mib, filesystem("ext4")), r.volume("two", "w", 16*mib, filesystem("ext4"))
	snap := r.snapshot(v, "s")
	here, _, _ := strings.Cut(v.id, "/")
	there, _, _ := strings.Cut(w.id, "/")
	handles := map[string]string{
		"truncated":           v.id[:len(v.id)-3],
		"without an image":    here + "/",
		"without a domain":    "/" + v.image(),
		"of another domain":   there + "/" + v.image(),
		"forged":              here + "/0123456789abcdef0123-100000001",
		"going up":            here + "/../../tags",
		"with more":           v.id + "/more",
		"upper case":          strings.ToUpper(v.id),
		"not ours":            "vol-0a1b2c3d",
		"too long":            here + "/" + strings.Repeat("a", 200),
		"with a NUL":          v.id + "\x00",
		"a snapshot's":        snap,
		"the first bytes of":  here + "/" + v.image()[:20],
		"with a space before": " " + v.id,
	}
	untouched(t, r, []*volume{v, w}, func() {
		for name, id := range handles {
			t.Run(name, func(t *testing.T) {
				for what, try := range callsOn(r, &volume{id: id, cap: v.cap}) {
					t.Run(what, func(t *testing.T) { refusal(t, try(), codes.NotFound) })
				}
				ctx, cancel := once()
				defer cancel()
				if _, err := r.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id}); err != nil {
					t.Errorf("DeleteVolume: %v", err)
				}
				if id != snap {
					if _, err := r.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id}); err != nil {
						t.Errorf("DeleteSnapshot: %v", err)
					}
					_, err := r.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: id})
					refusal(t, err, codes.NotFound)
				}
				if _, err := r.DeleteVolumeGroupSnapshot(ctx, &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: id}); err != nil {
					t.Errorf("DeleteVolumeGroupSnapshot: %v", err)
				}
				if _, err := r.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: id, NodeId: nodeID}); err != nil {
					t.Errorf("ControllerUnpublishVolume: %v", err)
				}
			})
		}
		ctx, cancel := once()
		defer cancel()
		_, err := r.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: "nirvana/" + v.image()})
		refusal(t, err, codes.Unavailable, "nirvana")
		_, err = r.DeleteVolume(ctx, &csi.DeleteVolumeRequest{})
		refusal(t, err, codes.InvalidArgument, "volume_id")
		if _, err := r.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: v.id}); err != nil { // a volume's
			t.Error(err)
		}
	})
	if _, err := call(r, r.GetSnapshot, &csi.GetSnapshotRequest{SnapshotId: snap}); err != nil {
		t.Errorf("the snapshot: %v", err)
	}
}

func TestTargetsOutsideTheKubeletsFolderAndSymlinksAreRefused(t *testing.T) {
	p := on(t, "one", "ext4", 256*mib)
	r := newRig(t, p)
	v, w := r.volume("one", "v", 16*mib, filesystem("ext4")), r.volume("one", "w", 16*mib, filesystem("ext4"))
	outside := filepath.Join(r.dir, "outside")
	for _, dir := range []string{outside, filepath.Join(r.Kubelet(), "real")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	link, file := filepath.Join(r.Kubelet(), "link"), filepath.Join(r.Kubelet(), "file")
	if err := os.Symlink(outside, link); err != nil {
		t.Fatal(err)
	}
	writeFile(t, file, []byte("a file"))
	published := must(r, r.ControllerPublishVolume, &csi.ControllerPublishVolumeRequest{VolumeId: v.id, NodeId: nodeID, VolumeCapability: v.cap})
	bad := map[string]struct {
		path string
		says []string
	}{
		"outside":              {filepath.Join(outside, "x"), []string{outside, "not inside the kubelet's folder", r.Kubelet()}},
		"beside":               {r.Kubelet() + "-not/x", []string{"not inside the kubelet's folder"}},
		"a link":               {link, []string{link, "symbolic link"}},
		"below a link":         {filepath.Join(link, "x"), []string{link, "symbolic link"}},
		"dots":                 {filepath.Join(r.Kubelet(), "real") + "/../../outside/x", []string{"..", "absolute path"}},
		"relative":             {"some/where", []string{"some/where", "absolute path"}},
		"NUL":                  {r.Kubelet() + "/a\x00b", []string{"NUL"}},
		"too long":             {r.Kubelet() + strings.Repeat("/long", 1000), []string{"4096"}},
		"the root":             {"/", []string{"root"}},
		"the kubelet's itself": {r.Kubelet(), []string{"not inside"}},
	}
	untouched(t, r, []*volume{w}, func() {
		for name, c := range bad {
			t.Run("stage/"+name, func(t *testing.T) {
				ctx, cancel := once()
				defer cancel()
				_, err := r.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: v.id, PublishContext: published.GetPublishContext(), StagingTargetPath: c.path, VolumeCapability: v.cap})
				refusal(t, err, codes.InvalidArgument, c.says...)
			})
		}
		ctx, cancel := once()
		defer cancel()
		_, err := r.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: v.id, PublishContext: published.GetPublishContext(), StagingTargetPath: file, VolumeCapability: v.cap})
		refusal(t, err, codes.InvalidArgument, file)
		if len(r.loops()) > 0 || len(r.mounts()) > 0 {
			t.Errorf("a refused stage left %v, %v", r.loops(), r.mounts())
		}
	})
	if err := v.stage(); err != nil {
		t.Fatal(err)
	}
	untouched(t, r, []*volume{w}, func() {
		for name, c := range bad {
			t.Run("publish/"+name, func(t *testing.T) {
				ctx, cancel := once()
				defer cancel()
				_, err := r.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging, TargetPath: c.path, VolumeCapability: v.cap})
				refusal(t, err, codes.InvalidArgument, c.says...)
			})
		}
		ctx, cancel := once()
		defer cancel()
		_, err := r.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging, TargetPath: file, VolumeCapability: v.cap})
		refusal(t, err, codes.InvalidArgument, file, "directory")
	})
	entries, err := os.ReadDir(outside)
	if err != nil || len(entries) > 0 {
		t.Errorf("something came into being outside: %v, %v", entries, err)
	}
	v.unmount()
	v.works()
}

// What sidecars add to parameters is taken.
func TestTheParametersOfTheSidecarsAreTaken(t *testing.T) {
	r := newRig(t, on(t, "one", "ext4", 64*mib))
	req := creation("one", "v", 16*mib, filesystem("ext4"))
	maps.Copy(req.Parameters, map[string]string{"csi.storage.k8s.io/pvc/name": "claim", "csi.storage.k8s.io/pvc/namespace": "space", "csi.storage.k8s.io/anything": "x"})
	r.create(req)
	if out, _ := r.kubectl("images"); !strings.Contains(out, "space/claim") {
		t.Errorf("kubectl-quarry images does not name the claim:\n%s", out)
	}
}

// A size that is not said, or that is too small, becomes one that is possible.
func TestSizesThatAreLeftOutOrTooSmallAreRaised(t *testing.T) {
	p := on(t, "one", "ext4", 64*mib)
	p.more = "  overcommit: 1000\n"
	r := newRig(t, p)
	for name, c := range map[string]struct {
		asked *csi.CapacityRange
		fs    string
		want  int64
	}{
		"not said":            {nil, "ext4", 1 << 30},
		"zero":                {&csi.CapacityRange{}, "ext4", 1 << 30},
		"a limit only":        {&csi.CapacityRange{LimitBytes: 32 * mib}, "ext4", 32 * mib},
		"one byte":            {&csi.CapacityRange{RequiredBytes: 1}, "xfs", 300 * mib},
		"not a multiple":      {&csi.CapacityRange{RequiredBytes: 16*mib + 1}, "ext4", 16*mib + 32<<10},
		"as large as allowed": {&csi.CapacityRange{RequiredBytes: 16 * mib, LimitBytes: 16 * mib}, "ext4", 16 * mib},
	} {
		t.Run(name, func(t *testing.T) {
			req := creation("one", name, 0, filesystem(c.fs))
			req.CapacityRange = c.asked
			if got := must(r, r.CreateVolume, req).GetVolume().GetCapacityBytes(); got != c.want {
				t.Errorf("it has %d bytes, want %d", got, c.want)
			}
		})
	}
}
