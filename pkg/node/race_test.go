package node

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
)

// answered stops a staging after the manager's answer, before anything is in the kernel.
type answered struct {
	*manager
	reached, goOn chan struct{}
}

func (a *answered) Stage(ctx context.Context, h image.Handle, node string, generation int64) (image.Staging, error) {
	st, err := a.manager.Stage(ctx, h, node, generation)
	close(a.reached)
	<-a.goOn
	return st, err
}

// A detaching meanwhile would otherwise be confirmed, and the slab deleted or
// used elsewhere while this node goes on to mount it.
func TestAnImageThatIsJustBeingStagedIsNotSaidToBeUnstaged(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", testSize)
	a := &answered{manager: w.manager, reached: make(chan struct{}), goOn: make(chan struct{})}
	w.node.cfg.Manager = a
	staged := make(chan error, 1)
	go func() { staged <- w.node.Stage(bg, w.request(h, "")) }()
	<-a.reached
	is, err := w.node.Staged(bg, h)
	close(a.goOn)
	w.ok(<-staged)
	if err == nil {
		t.Fatalf("staged=%t while it was being staged", is)
	}
	w.fails(err, fault.Pending, "running")
	is, err = w.node.Staged(bg, h)
	w.ok(err)
	if !is {
		t.Fatal("it is staged")
	}
}

// A final error code makes the kubelet forget the volume: no unstaging would come.
func TestAStagingThatFailsAfterTheMountLeavesNothingOrSaysSo(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", testSize)
	w.stage(h, host.XFS)
	w.unstage(h)
	w.change(h, func(s *image.Staging) { s.Size *= 2 })
	w.ok(os.Truncate(w.path("v"), 2*testSize))
	w.node.host = host.NewLocal(without{"xfs_growfs"})
	w.node.devices.Host = w.node.host
	err := w.node.Stage(bg, w.request(h, host.XFS))
	staged, serr := w.node.Staged(bg, h)
	w.ok(serr)
	if err == nil || staged && fault.KindOf(err) != fault.Unavailable {
		t.Fatalf("staged=%t after %v", staged, err)
	}
}

// without is a host on which a program is not installed.
type without struct{ program string }

func (p without) Run(ctx context.Context, c host.Command) (host.Result, error) {
	if c.Name == p.program {
		return host.Result{}, fault.New(fault.Unsupported, "%s is not installed", c.Name)
	}
	return host.Exec{}.Run(ctx, c)
}

// Only the image's own filesystem is ever frozen: whatever lies over its mount,
// or below where it was, may hold the slabs of all.
func TestFreezingNeverReachesAnotherFilesystem(t *testing.T) {
	w := newWorld(t)
	v, u := w.volume("v", testSize), w.volume("u", testSize)
	w.stage(v, host.Ext4)
	w.stage(u, host.Ext4)
	w.ok(unix.Mount(w.staging(u), w.staging(v), "", unix.MS_BIND, ""))
	frozen, err := w.node.Freeze(bg, v, time.Minute)
	reached := isFrozen(t, w.staging(u))
	if err == nil {
		w.ok(w.node.Thaw(bg, v))
	}
	if reached || err == nil {
		t.Fatalf("freezing v: %v %v; u frozen: %t", frozen, err, reached)
	}
	w.fails(err, fault.Unavailable, "covers")
	w.ok(unix.Unmount(w.staging(v), 0))
	inside := filepath.Join(w.staging(v), "directory")
	w.ok(os.Mkdir(inside, 0o700))
	f, err := w.node.host.Freeze(bg, inside, time.Minute) // as where something was just unmounted
	if err == nil {
		w.ok(f.Thaw())
	}
	w.fails(err, fault.Conflict, "not a mount point")
}

// Mount flags may hold passwords (CSI): errors are logged, and name them only.
func TestErrorsDoNotTellTheValuesOfMountFlags(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", testSize)
	for _, flag := range []string{"password=geheim", "password=geheim,x", "x-password=geheim", "-password=geheim"} {
		r := w.request(h, host.Ext4)
		r.MountFlags = []string{flag}
		err := w.node.Stage(bg, r)
		w.fails(err, fault.Invalid, "password")
		if strings.Contains(err.Error(), "geheim") {
			t.Errorf("%v", err)
		}
	}
	tree := w.handle("tree")
	w.ok(os.Mkdir(w.path("tree"), 0o755))
	w.set(tree, image.Staging{Handle: tree, Layout: image.LayoutDirectory, Size: testSize, Slabs: []image.SlabRef{{ID: "tree"}}})
	r := w.request(tree, "")
	r.MountFlags = []string{"password=geheim"}
	for _, err := range []error{w.node.Stage(bg, r), checkFlags(r.MountFlags, true)} {
		w.fails(err, fault.Invalid, "password")
		if strings.Contains(err.Error(), "geheim") {
			t.Errorf("%v", err)
		}
	}
}
