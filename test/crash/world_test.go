package crash_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/dir"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/mover"
)

const (
	kib = 1 << 10
	mib = 1 << 20
)

// long says whether every point is to be tried.
func long() bool { return os.Getenv("QUARRY_CRASH") == "long" }

func TestMain(m *testing.M) {
	klog.SetSlogLogger(slog.New(slog.DiscardHandler)) // thousands of expected failures
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given { // worlds on a real file system wait for flushes most of the time
		if err := flag.Set("test.parallel", strconv.Itoa(2*runtime.GOMAXPROCS(0))); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// clock is a clock that tests turn.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) turn(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// nodes are fake nodes on which nothing is ever staged.
type nodes struct{}

func (nodes) Agent(node string) (image.Agent, error) {
	if node != "n1" && node != "n2" {
		return nil, fault.New(fault.NotFound, "there is no node %s", node)
	}
	return nodes{}, nil
}

func (nodes) Freeze(context.Context, image.Handle, time.Duration) (image.Frozen, error) {
	return image.NotStaged, nil
}
func (nodes) Thaw(context.Context, image.Handle) error           { return nil }
func (nodes) Staged(context.Context, image.Handle) (bool, error) { return false, nil }

// storage is where domains are made, and how they are opened.
type storage struct {
	name    string
	root    string // the folder in which each domain has one, as the machine sees it whose disk it is on
	minimal bool   // without any capability
	layers  bool   // with nodes that can build chains of layers
	share   *share // nil: the engine is dir
}

// share is how the engine of a server comes to a domain's folder.
type share struct {
	engine string
	open   func(ctx context.Context, folder string) (engine.Engine, error)
	// give gives a new folder to those who are to write in it; nil: root may.
	give func(folder string)
	// decorated names have "_" before and after them on the disk.
	decorated bool
}

// open opens the domain in a folder of the storage.
func (s storage) open(ctx context.Context, folder string) (engine.Engine, error) {
	if s.share != nil {
		return s.share.open(ctx, folder)
	}
	return dir.Open(ctx, map[string]string{"path": folder}, host.Exec{})
}

// engine is the type of the engine.
func (s storage) engine() string {
	if s.share != nil {
		return s.share.engine
	}
	return "dir"
}

// onDisk is the name of a slab, a tag or a class in its folder; offDisk is the reverse.
func (s storage) onDisk(name string) string {
	if s.share != nil && s.share.decorated {
		return "_" + name + "_"
	}
	return name
}

func (s storage) offDisk(name string) string {
	if s.share != nil && s.share.decorated {
		return strings.TrimSuffix(strings.TrimPrefix(name, "_"), "_")
	}
	return name
}

// storages are the two that differ most: everything native, and everything by
// default.
func storages(t *testing.T) []storage {
	t.Setenv("TMPDIR", shm(t))
	return []storage{
		{name: "minimal on tmpfs", root: t.TempDir(), minimal: true},
		{name: "native on XFS", root: hosttest.Filesystem(t, "xfs", 1<<30)},
	}
}

// shm is a folder in memory, where a flush costs nothing.
func shm(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "quarry-crash-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// resumes counts the copies that began in the middle.
type resumes struct {
	mover.Files
	mu    sync.Mutex
	count int
	// from is where the last one began, durable what the last checkpoint sealed.
	from, durable int64
	checkpoints   int
	fatal         int // the checkpoint after which the process dies; 0: none
	die           func()
}

func (r *resumes) dieAt(checkpoint int, die func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.checkpoints, r.fatal, r.die = 0, checkpoint, die
}

func (r *resumes) CopyBlock(ctx context.Context, src, dst string, o image.BlockCopy) error {
	if o.From > 0 {
		r.mu.Lock()
		r.count++
		r.from = o.From
		r.mu.Unlock()
	}
	if seal := o.Checkpoint; seal != nil {
		o.Checkpoint = func(offset int64) error {
			if err := seal(offset); err != nil {
				return err
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			r.durable = offset
			if r.checkpoints++; r.fatal == r.checkpoints {
				r.die()
				return errDead
			}
			return nil
		}
	}
	return r.Files.CopyBlock(ctx, src, dst, o)
}

func (r *resumes) n() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.count
}

// process is one life of a manager.
type process struct {
	*image.Manager
	control *control
	engines map[string]engine.Engine // by domain, as the control does not touch them
}

// world is a set of domain directories, the process that runs on them, and what
// it has acknowledged.
type world struct {
	t      testing.TB
	ctx    context.Context
	kind   storage
	layout image.Layout
	dirs   map[string]string // domain: directory
	clock  *clock
	mover  *resumes
	torn   bool
	story  string  // for failures: what was done to this world
	kernel *kernel // of the node; nil where it has no device-mapper
	// reboots: what is in use on the node comes to its end with the process.
	reboots bool
	rate    int64 // of merges, bytes per second
	process
}

func newWorld(t testing.TB, s storage, layout image.Layout) *world {
	w := &world{t: t, ctx: t.Context(), kind: s, layout: layout, dirs: map[string]string{},
		clock: &clock{now: time.UnixMilli(1_700_000_000_000)},
		mover: &resumes{Files: mover.New(mover.Options{Workers: 2, Buffer: 32 * kib, CheckpointEvery: 64 * kib})}}
	for _, d := range []string{"a", "b"} {
		path, err := os.MkdirTemp(s.root, "world-"+d+"-")
		w.must(err)
		w.dirs[d] = path
		if s.share != nil && s.share.give != nil {
			s.share.give(path)
		}
	}
	if s.layers {
		w.kernel = newKernel(t, w.dirs)
	}
	w.start()
	t.Cleanup(func() { _ = w.Close() }) // also when the test fails
	return w
}

// end closes the world and removes its directories.
func (w *world) end() {
	w.waitForMerges()
	if w.kernel != nil {
		w.must(w.kernel.fine())
	}
	w.must(w.Close())
	for _, d := range w.dirs {
		w.must(os.RemoveAll(d))
	}
}

func (w *world) fatalf(format string, args ...any) {
	w.t.Helper()
	w.t.Fatalf("%s: %s", w.story, fmt.Sprintf(format, args...))
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.fatalf("%v", err)
	}
}

// unstaged says what the node says when it has taken a volume down.
func (w *world) unstaged(h image.Handle) {
	w.t.Helper()
	o, err := w.Outline(w.ctx, h, "n1")
	w.must(err)
	w.must(w.Unstaged(w.ctx, h, "n1", o.Told))
}

// launch opens a manager over the directories without giving up the present one.
func (w *world) launch() process {
	w.t.Helper()
	p, err := w.tryLaunch(&control{})
	w.must(err)
	return p
}

func (w *world) tryLaunch(c *control) (process, error) {
	p := process{control: c, engines: map[string]engine.Engine{}}
	var agents image.Agents = nodes{}
	if w.kernel != nil {
		agents = chainAgents{w.kernel, p.control}
	}
	worker := &mover.Local{Files: w.mover, Agents: agents}
	p.Manager = image.New(image.Config{Installation: "test", Agents: agents, Worker: worker, Now: w.clock.Now, LookEvery: time.Millisecond, CollectEvery: -1})
	worker.Engines = p.Engine
	for _, name := range []string{"a", "b"} {
		e, err := w.kind.open(w.ctx, w.dirs[name])
		w.must(err)
		p.engines[name] = e
		if w.kind.minimal {
			e = engine.Minimal(e)
		}
		f := newFaulty(e, p.control)
		f.torn = w.torn
		if _, err := p.AddDomain(w.ctx, image.DomainConfig{Name: name, Engine: w.kind.engine(), Scope: image.ScopeShared, Overcommit: 1000, BackgroundRate: w.rate}, f); err != nil {
			return p, errors.Join(err, f.Close(), p.Close())
		}
	}
	return p, nil
}

func (w *world) start() { w.t.Helper(); w.process = w.launch() }

// restart abandons the process, dead or alive, and starts another.
func (w *world) restart() {
	w.t.Helper()
	_ = w.Close()
	if w.kernel != nil {
		w.must(w.kernel.fine())
		if w.reboots {
			w.kernel.reboot()
		}
		w.kernel.restart()
	}
	w.start()
}

// waitForMerges waits until no merge runs in the background.
func (w *world) waitForMerges() {
	for slices.ContainsFunc(w.Operations(), isMerge) {
		time.Sleep(time.Millisecond)
	}
}

// piece of content at an offset of a block image.
var offsets = []int64{4 * kib, 300 * kib, 900 * kib}

const pieceSize = 96 * kib

// contents that were made before.
var contents sync.Map

// content of an image by seed; seed 0 is empty.
func content(seed uint64, i int) []byte {
	if b, ok := contents.Load([2]uint64{seed, uint64(i)}); ok {
		return b.([]byte)
	}
	b := makeContent(seed, i)
	if seed < 100 {
		contents.Store([2]uint64{seed, uint64(i)}, b)
	}
	return b
}

func makeContent(seed uint64, i int) []byte {
	b := make([]byte, pieceSize)
	rnd := rand.New(rand.NewPCG(seed, uint64(i)))
	for j := 0; j < len(b); j += 8 {
		v := rnd.Uint64()
		for k := range 8 {
			b[j+k] = byte(v >> (8 * k))
		}
	}
	return b
}

// path is where an image's slab lies on the disk.
func (w *world) path(img image.Image) string {
	path := filepath.Join(w.dirs[img.Handle.Domain], "slabs", w.kind.onDisk(img.Slab))
	if img.Layout == image.LayoutDirectory {
		path = filepath.Join(path, "data")
	}
	return path
}

// write replaces an image's content.
func (w *world) write(img image.Image, seed uint64) {
	w.t.Helper()
	w.must(w.put(img, seed))
}

func (w *world) put(img image.Image, seed uint64) (err error) {
	path := w.path(img)
	if w.kind.share != nil { // written as a node does: what its client caches is then the same for all
		e := w.engines[img.Handle.Domain]
		at, failed := e.AttachSlab(w.ctx, img.Slab, engine.AttachOptions{})
		if failed != nil {
			return failed
		}
		defer func() { err = errors.Join(err, e.DetachSlab(w.ctx, img.Slab)) }()
		path = at.Path
	}
	if img.Layout == image.LayoutDirectory {
		if err := os.Mkdir(filepath.Join(path, "folder"), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		return errors.Join(os.WriteFile(filepath.Join(path, "first"), content(seed, 0), 0o640),
			os.WriteFile(filepath.Join(path, "folder", "second"), content(seed, 1), 0o600))
	}
	if w.kernel != nil {
		if now, err := w.Get(w.ctx, img.Handle); err == nil {
			img = now
		}
		return w.kernel.put(img, offsets, [][]byte{content(seed, 0), content(seed, 1), content(seed, 2)})
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	for i, off := range offsets {
		if _, err := f.WriteAt(content(seed, i), off); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return f.Close()
}

// holds says how an image differs from a seed's content.
func (w *world) holds(img image.Image, seed uint64) error {
	path := w.path(img)
	if img.Layout == image.LayoutDirectory {
		for i, name := range []string{"first", "folder/second"} {
			got, err := os.ReadFile(filepath.Join(path, name))
			switch {
			case seed == 0 && errors.Is(err, os.ErrNotExist):
			case seed == 0:
				return fmt.Errorf("%s is not empty (%v)", img.Handle, err)
			case err != nil:
				return err
			case !bytes.Equal(got, content(seed, i)):
				return fmt.Errorf("%s: %s does not hold content %d", img.Handle, name, seed)
			}
		}
		return nil
	}
	buffer := buffers.Get().(*[]byte)
	defer buffers.Put(buffer)
	var got []byte
	var err error
	if w.kernel != nil {
		got, err = w.kernel.content(img)
	} else {
		got, err = readInto(buffer, path)
	}
	if err != nil {
		return err
	}
	if int64(len(got)) < img.Size {
		return fmt.Errorf("%s has %d bytes, recorded are %d", img.Handle, len(got), img.Size)
	}
	end := 0
	same := true
	if seed != 0 {
		for i, off := range offsets {
			same = same && zero(got[end:off]) && bytes.Equal(got[off:off+pieceSize], content(seed, i))
			end = int(off) + pieceSize
		}
	}
	if !same || !zero(got[end:]) {
		return fmt.Errorf("%s does not hold content %d", img.Handle, seed)
	}
	return nil
}

// buffers for reading images: checks read every image again and again, and new
// memory for each would cost more than the reading.
var buffers = sync.Pool{New: func() any { return new([]byte) }}

// readInto is os.ReadFile into a buffer that is used again.
func readInto(buffer *[]byte, path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if int64(len(*buffer)) < st.Size() {
		*buffer = make([]byte, st.Size())
	}
	b := (*buffer)[:st.Size()]
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return b, nil
}

// zero says whether b holds only zero bytes.
func zero(b []byte) bool {
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1])
}

func (w *world) access() []image.Access {
	if w.layout == image.LayoutDirectory {
		return []image.Access{{Mode: image.SingleNodeWriter}}
	}
	return []image.Access{{Mode: image.SingleNodeWriter, Block: true}}
}

func (w *world) createIn(p process, name, domain string, src image.Image, size int64) (image.Image, error) {
	r := image.CreateRequest{Name: name, Domains: []string{domain}, Layout: w.layout, Accesses: w.access(), Size: size,
		Described: image.Described{Namespace: "default", Claim: name}}
	if src.Slab != "" {
		r.Source, r.SourceMutable = src.Handle.String(), src.Mutable
	}
	return p.CreateVolume(w.ctx, r)
}

func (w *world) create(name, domain string, src image.Image, size int64) (image.Image, error) {
	return w.createIn(w.process, name, domain, src, size)
}

func (w *world) snap(name string, of image.Image) (image.Image, error) {
	return w.CreateSnapshot(w.ctx, image.SnapshotRequest{Name: name, Source: of.Handle, Described: image.Described{Namespace: "default", Claim: name}})
}

// list is every visible image.
func (w *world) list(p process) []image.Image {
	w.t.Helper()
	var out []image.Image
	for _, mutable := range []bool{true, false} {
		l, more, err := p.List(w.ctx, mutable, "", 0)
		w.must(err)
		if more {
			w.fatalf("an unlimited list has more")
		}
		out = append(out, l...)
	}
	return out
}

// collect lets everything that is due be removed, however long it takes.
func (w *world) collect() error {
	for round := range 8 {
		if err := w.Collect(w.ctx); err != nil {
			return err
		}
		w.waitForMerges()
		w.clock.turn(11 * time.Minute)
		if round == 2 { // a half-done copy waits so long for its request to be repeated
			w.clock.turn(time.Hour)
		}
	}
	return nil
}

// onDisk are the slabs, or the tags without those of epochs.
func (w *world) onDisk(domain, kind string) []string {
	w.t.Helper()
	var out []string
	if kind == "slabs" {
		entries, err := os.ReadDir(filepath.Join(w.dirs[domain], kind))
		w.must(err)
		for _, e := range entries {
			out = append(out, w.kind.offDisk(e.Name()))
		}
		slices.Sort(out)
		return out
	}
	root := filepath.Join(w.dirs[domain], "tags")
	w.must(filepath.Walk(root, func(p string, st os.FileInfo, err error) error {
		if err != nil || st.IsDir() {
			return err
		}
		if name := w.kind.offDisk(st.Name()); !strings.HasPrefix(name, "e.") && !strings.HasPrefix(name, "o.") && name != "n.id" {
			out = append(out, name)
		}
		return nil
	}))
	return out
}

// noLeaks checks, after a full collection, that there are exactly one slab and
// one record for each visible image.
func (w *world) noLeaks(groups int) {
	w.t.Helper()
	images := w.list(w.process)
	var needed []image.Image // deleted ones whose slabs others still need
	for _, img := range w.All(w.ctx) {
		if img.State == image.Deleting && len(img.Children) > 0 {
			needed = append(needed, img)
		}
	}
	for _, d := range []string{"a", "b"} {
		var slabs []string
		tags := 0
		for _, img := range images {
			if img.Handle.Domain == d {
				for _, s := range img.Chain {
					slabs = append(slabs, s.ID)
				}
				tags++
			}
		}
		for _, img := range needed {
			if img.Handle.Domain == d {
				tags++
			}
		}
		if d == "a" {
			tags += groups
		}
		slices.Sort(slabs)
		slabs = slices.Compact(slabs)
		have := w.onDisk(d, "slabs")
		if !slices.Equal(have, slabs) {
			w.fatalf("slabs in %s: %v, the images have %v", d, have, slabs)
		}
		records := slices.DeleteFunc(w.onDisk(d, "tags"), func(s string) bool {
			return slices.ContainsFunc(append(images, needed...), func(i image.Image) bool {
				if s == "d."+i.Handle.Image {
					return true
				}
				return slices.ContainsFunc(i.Attachments, func(a image.Attachment) bool {
					return s == fmt.Sprintf("a.%s.%s.%016x", i.Handle.Image, a.Node, a.Generation)
				})
			})
		})
		if len(records) != tags {
			w.fatalf("tags in %s: %v, for %d images and groups", d, records, tags)
		}
	}
}

// empty deletes everything, collects, and checks that nothing is left.
func (w *world) empty(groups ...image.Handle) {
	w.t.Helper()
	for _, g := range groups {
		w.must(w.DeleteGroup(w.ctx, g))
	}
	for _, img := range w.list(w.process) {
		if img.Mutable {
			if w.kernel != nil {
				w.kernel.unstage(img.Handle)
			}
			w.must(w.Detach(w.ctx, img.Handle, ""))
			w.must(w.DeleteVolume(w.ctx, img.Handle))
		} else {
			w.must(w.DeleteSnapshot(w.ctx, img.Handle))
		}
	}
	w.must(w.collect())
	w.noLeaks(0)
}
