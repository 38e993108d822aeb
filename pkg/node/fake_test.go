package node

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
)

// world is a node with an engine and a manager that only remember.
type world struct {
	t      *testing.T
	domain string // of its own, because marks of devices are the host's
	dir    string // holds slabs and stands for the kubelet's folder
	node   *Node
	slabs  *attachments
	*manager
}

// manager is the part of the Image Manager that a node sees, with one slab per
// image named like it.
type manager struct {
	mu        sync.Mutex
	images    map[image.Handle]image.Staging
	unstaged  map[image.Handle]int
	formatted map[image.Handle]int
	down      error // what every call answers, if not nil
	failSeal  error // what Formatted answers, if not nil
}

func (m *manager) Stage(_ context.Context, h image.Handle, _ string, _ int64) (image.Staging, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.down != nil {
		return image.Staging{}, m.down
	}
	st, ok := m.images[h]
	if !ok {
		return st, fault.New(fault.NotFound, "no image %s", h)
	}
	st.Domain = h.Domain
	st.Slabs = slices.Clone(st.Slabs)
	for i := range st.Slabs {
		st.Slabs[i].Size = st.Size // one raw slab
	}
	return st, nil
}

func (m *manager) Formatted(_ context.Context, h image.Handle, _, filesystem string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failSeal != nil {
		return m.failSeal
	}
	st := m.images[h]
	st.Fresh, st.Filesystem = false, filesystem
	m.images[h] = st
	m.formatted[h]++
	return nil
}

func (m *manager) Built(context.Context, image.Handle, string, int64) error { return nil }

func (m *manager) Unstaged(_ context.Context, h image.Handle, _ string, _ int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.unstaged[h]++
	return m.down
}

func (m *manager) Outline(_ context.Context, h image.Handle, _ string) (image.Outline, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.down != nil {
		return image.Outline{}, m.down
	}
	st, ok := m.images[h]
	if !ok {
		return image.Outline{}, fault.New(fault.NotFound, "no image %s", h)
	}
	return image.Outline{Size: st.Size - st.Crypt, Slabs: st.Slabs}, nil
}

// files is an engine of which a node needs only attaching.
type files struct {
	engine.Engine
	dir string
	*attachments
}

// attachments are the slabs that are attached now.
type attachments struct {
	mu      sync.Mutex
	slabs   map[string]bool
	stuck   error               // what detaching answers, if not nil
	options map[string][]string // mount options that a slab was attached with
	reached chan struct{}       // if not nil, attaching says so there and waits
	goOn    chan struct{}
}

func newAttachments() *attachments {
	return &attachments{slabs: map[string]bool{}, options: map[string][]string{}}
}

func (a *attachments) of(id string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.slabs[id]
}

func (a *attachments) fail(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stuck = err
}

func (f files) AttachSlab(_ context.Context, id string, opts engine.AttachOptions) (engine.Attachment, error) {
	for _, o := range opts.MountOptions {
		if !strings.HasPrefix(o, "actimeo=") {
			return engine.Attachment{}, engine.NoMountOptions(engine.AttachOptions{MountOptions: []string{o}})
		}
	}
	p := filepath.Join(f.dir, id)
	f.mu.Lock()
	reached, goOn := f.reached, f.goOn
	f.mu.Unlock()
	if reached != nil {
		reached <- struct{}{}
		<-goOn
	}
	if _, err := os.Lstat(p); err != nil {
		return engine.Attachment{}, fault.New(fault.NotFound, "slab %s: %w", id, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.slabs[id], f.options[id] = true, opts.MountOptions
	return engine.Attachment{Path: p}, nil
}

func (f files) DetachSlab(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stuck == nil {
		delete(f.slabs, id)
	}
	return f.stuck
}

func (f files) Describe(context.Context) (engine.Description, error) {
	return engine.Description{}, nil
}

func newManager() *manager {
	return &manager{images: map[image.Handle]image.Staging{}, unstaged: map[image.Handle]int{}, formatted: map[image.Handle]int{}}
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root for loop devices and mounts")
	}
	dir := t.TempDir()
	return newWorldIn(t, dir, strings.ToLower(filepath.Base(filepath.Dir(dir))))
}

// newWorldIn is newWorld with its slabs in a folder, and its domain's name.
func newWorldIn(t *testing.T, dir, domain string) *world {
	t.Helper()
	w := &world{t: t, dir: dir, domain: domain, manager: newManager(), slabs: newAttachments()}
	w.restart()
	t.Cleanup(w.cleanUp)
	return w
}

// restart stands for an agent that died: nothing that it knew remains.
func (w *world) restart() {
	users := engine.NewUsers(files{dir: w.dir, attachments: w.slabs})
	w.node = New(Config{NodeID: "n1", Manager: w.manager, KubeletDir: w.dir,
		Engines: func(d string) (*engine.Users, error) {
			if d != w.domain {
				return nil, fault.New(fault.Unavailable, "domain %s is not open", d)
			}
			return users, nil
		}})
}

// begin is what an agent does when it starts.
func (w *world) begin() {
	w.t.Helper()
	w.node.Start(context.Background())
	w.ok(w.node.Clean(context.Background()))
}

// cleanUp takes down whatever a test left below its folder.
func (w *world) cleanUp() {
	l := host.NewLocal(host.Exec{})
	mounts, err := l.Mounts()
	if err != nil {
		w.t.Error(err)
	}
	for i := len(mounts) - 1; i >= 0; i-- {
		if inside(w.dir, mounts[i].Point) {
			if err := unix.Unmount(mounts[i].Point, 0); err != nil {
				w.t.Errorf("unmount %s: %v", mounts[i].Point, err)
			}
		}
	}
	for h := range w.images {
		found, err := w.node.devices.Find(context.Background(), h.String())
		if err != nil {
			w.t.Error(err)
		}
		for _, d := range found {
			if err := w.node.devices.Detach(context.Background(), d); err != nil {
				w.t.Error(err)
			}
		}
	}
}

func inside(dir, path string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != ".." && (len(rel) < 3 || rel[:3] != "../")
}

func (w *world) handle(name string) image.Handle { return image.Handle{Domain: w.domain, Image: name} }

// volume makes a fresh image of size bytes.
func (w *world) volume(name string, size int64) image.Handle {
	w.t.Helper()
	f, err := os.Create(filepath.Join(w.dir, name))
	w.ok(err)
	w.ok(f.Truncate(size))
	w.ok(f.Close())
	h := w.handle(name)
	w.set(h, image.Staging{Handle: h, Layout: image.LayoutImage, Size: size, Slabs: []image.SlabRef{{ID: name}}, Fresh: true})
	return h
}

func (w *world) set(h image.Handle, st image.Staging) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.images[h] = st
}

func (w *world) change(h image.Handle, f func(*image.Staging)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	st := w.images[h]
	f(&st)
	w.images[h] = st
}

// clone copies a volume's slab and record.
func (w *world) clone(of image.Handle, name string, size int64) image.Handle {
	w.t.Helper()
	ctx := context.Background()
	_, err := host.Exec{}.Run(ctx, host.Command{Name: "cp", Args: []string{"--sparse=always", filepath.Join(w.dir, of.Image), filepath.Join(w.dir, name)}})
	w.ok(err)
	w.ok(os.Truncate(filepath.Join(w.dir, name), size))
	h := w.handle(name)
	st := w.images[of]
	st.Handle, st.Slabs, st.Size, st.Cloned = h, []image.SlabRef{{ID: name, Size: size}}, size, true
	w.set(h, st)
	return h
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

// staging returns a staging directory, as the kubelet makes it.
func (w *world) staging(h image.Handle) string {
	p := w.path("staging-" + h.Image)
	w.ok(os.MkdirAll(p, 0o750))
	return p
}

func (w *world) request(h image.Handle, fs string) StageRequest {
	return StageRequest{Handle: h, StagingPath: w.staging(h), Access: image.Access{Filesystem: fs, Mode: image.SingleNodeMultiWriter}}
}

func (w *world) stage(h image.Handle, fs string) {
	w.t.Helper()
	w.ok(w.node.Stage(context.Background(), w.request(h, fs)))
}

func (w *world) unstage(h image.Handle) {
	w.t.Helper()
	w.ok(w.node.Unstage(context.Background(), h, w.staging(h)))
	staged, err := w.node.Staged(context.Background(), h)
	w.ok(err)
	if staged {
		w.t.Fatalf("%s is still staged", h)
	}
}

func (w *world) publication(h image.Handle, target string) PublishRequest {
	return PublishRequest{Handle: h, StagingPath: w.staging(h), TargetPath: w.path(target), Access: image.Access{Mode: image.SingleNodeMultiWriter}}
}

func (w *world) ok(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// fails wants an error of a kind that mentions words.
func (w *world) fails(err error, kind fault.Kind, words ...string) {
	w.t.Helper()
	if err == nil {
		w.t.Fatalf("it succeeded; wanted %v mentioning %q", kind, words)
	}
	if got := fault.KindOf(err); got != kind {
		w.t.Fatalf("%v is %v, wanted %v", err, got, kind)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			w.t.Fatalf("%q does not mention %q", err, word)
		}
	}
}

func (w *world) write(path, content string) {
	w.t.Helper()
	f, err := os.Create(path)
	w.ok(err)
	_, err = f.WriteString(content)
	w.ok(err)
	w.ok(f.Sync())
	w.ok(f.Close())
}

func (w *world) reads(path, want string) {
	w.t.Helper()
	b, err := os.ReadFile(path)
	w.ok(err)
	if string(b) != want {
		w.t.Fatalf("%s holds %q, wanted %q", path, b, want)
	}
}

func (w *world) absent(path string) {
	w.t.Helper()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		w.t.Fatalf("%s is still there (%v)", path, err)
	}
}
