package crash_test

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// TestRandomOperationsAgainstAModel lets a random sequence of operations, with
// crashes, lost replies, restarts and collector rounds, agree with a plain
// model in memory. A third of the worlds have layers: there volumes are in use on a
// node, which may be rebooted, and merges go on beside the operations. QUARRY_SEED repeats
// a sequence, but for what those merges do when.
func TestRandomOperationsAgainstAModel(t *testing.T) {
	count, seed := 750, uint64(time.Now().UnixNano())
	if long() {
		count = 10_000
	}
	if s := os.Getenv("QUARRY_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	st := append(storages(t), layered(t))
	const perWorld = 250
	var steps, stagings, merges atomic.Int64
	t.Run("worlds", func(t *testing.T) {
		for i := 0; i*perWorld < count; i++ {
			layout, kind := image.LayoutImage, st[i%len(st)]
			if i%4 == 3 && !kind.layers {
				layout = image.LayoutDirectory
			}
			t.Run(strconv.Itoa(i), func(t *testing.T) {
				t.Parallel()
				m := newModel(t, kind, layout, seed, uint64(i))
				for range perWorld {
					m.step()
					steps.Add(1)
				}
				m.end()
				stagings.Add(m.stagings)
				if m.kernel != nil {
					merges.Add(int64(len(m.kernel.merges)))
				}
			})
		}
	})
	t.Logf("%d operations, %d stagings, %d merges of layers, QUARRY_SEED=%d", steps.Load(), stagings.Load(), merges.Load(), seed)
	if stagings.Load() == 0 || merges.Load() == 0 {
		t.Error("layers were not tried at all")
	}
}

// modelImage is what the model knows of an acknowledged image.
type modelImage struct {
	img   image.Image
	seed  uint64
	nodes map[string]bool // attached; false: it is not known whether
	size  []int64         // the last is acknowledged or asked for
}

// model is the plain truth.
type model struct {
	*world
	rnd     *rand.Rand
	steps   int
	seeds   uint64
	images  map[image.Handle]*modelImage
	groups  map[image.Handle][]image.Handle
	unsure  map[string][]uint64   // names asked for without an answer, and their possible contents
	perhaps map[image.Handle]bool // deletions without an answer
	staged  map[image.Handle]bool // in use on n1; only where there are layers
	// stagings that succeeded.
	stagings int64
	log      []string
}

func newModel(t *testing.T, st storage, layout image.Layout, seed, number uint64) *model {
	m := &model{world: newWorld(t, st, layout), rnd: rand.New(rand.NewPCG(seed, number)), images: map[image.Handle]*modelImage{},
		groups: map[image.Handle][]image.Handle{}, unsure: map[string][]uint64{}, perhaps: map[image.Handle]bool{}, staged: map[image.Handle]bool{}}
	if m.kernel != nil {
		m.kernel.steps = 2
	}
	m.story = fmt.Sprintf("QUARRY_SEED=%d, world %d (%s, %s)", seed, number, st.name, layout)
	return m
}

func (m *model) note(format string, args ...any) {
	m.log = append(m.log, fmt.Sprintf(format, args...))
	if len(m.log) > 12 {
		m.log = m.log[1:]
	}
}

func (m *model) failf(format string, args ...any) {
	m.t.Helper()
	for _, l := range m.log {
		m.t.Log(l)
	}
	m.fatalf("step %d: %s", m.steps, fmt.Sprintf(format, args...))
}

// pick chooses an acknowledged image, in an order that depends on the seed only.
func (m *model) pick(ok func(*modelImage) bool) *modelImage {
	var list []*modelImage
	for _, h := range slices.SortedFunc(maps.Keys(m.images), func(a, b image.Handle) int {
		switch {
		case a.String() < b.String():
			return -1
		case a.String() > b.String():
			return 1
		}
		return 0
	}) {
		if mi := m.images[h]; !m.perhaps[h] && ok(mi) {
			list = append(list, mi)
		}
	}
	if len(list) == 0 {
		return nil
	}
	return list[m.rnd.IntN(len(list))]
}

func volumes(mi *modelImage) bool    { return mi.img.Mutable }
func anything(*modelImage) bool      { return true }
func standalone(mi *modelImage) bool { return mi.img.Group == "" }

func (m *model) domain() string { return []string{"a", "b"}[m.rnd.IntN(2)] }

// step does one operation, perhaps with a mishap.
func (m *model) step() {
	m.steps++
	mishap := none
	if m.rnd.IntN(4) == 0 {
		mishap = []mode{crashBefore, crashAfter, lostReply, outage, refused}[m.rnd.IntN(5)]
		m.control.arm(mishap, 1+m.rnd.IntN(15))
	}
	m.operate()
	hit := m.control.hit()
	if hit != "" {
		m.note("  %s: %s", mishap, hit)
	}
	m.control.arm(none, 0)
	if (hit != "" && (mishap == crashBefore || mishap == crashAfter)) || m.rnd.IntN(25) == 0 {
		m.again()
	}
	if m.kernel == nil || m.rnd.IntN(2) == 0 {
		m.waitForMerges() // what is listed must not change while it is read
		m.compare()
	}
}

// again restarts the process, and with layers perhaps the node.
func (m *model) again() {
	m.reboots = m.kernel != nil && m.rnd.IntN(3) == 0
	m.note("restart (the node, too: %t)", m.reboots)
	m.restart()
	if m.reboots {
		clear(m.staged)
	}
}

func (m *model) operate() {
	small := len(m.images) < 14
	if m.kernel != nil && m.rnd.IntN(3) == 0 {
		m.work()
		return
	}
	switch n := m.rnd.IntN(100); {
	case n < 12 && small:
		m.createFrom(nil)
	case n < 26 && small:
		if src := m.pick(anything); src != nil {
			m.createFrom(src)
		}
	case n < 38 && small:
		m.takeSnapshot()
	case n < 43 && small:
		m.takeGroup()
	case n < 50:
		if v := m.pick(volumes); v != nil {
			m.expand(v)
		}
	case n < 58:
		if v := m.pick(volumes); v != nil {
			m.attachment(v)
		}
	case n < 63:
		if v := m.pick(volumes); v != nil {
			limit := 2 + m.rnd.IntN(20)
			m.note("modify %s", v.img.Handle)
			m.may("modify", m.Modify(m.ctx, v.img.Handle, image.Tuning{ChainLimit: limit}, nil))
		}
	case n < 70:
		if v := m.pick(m.writable); v != nil {
			m.rewrite(v)
		}
	case n < 92:
		m.remove()
	default:
		m.clock.turn(time.Duration(m.rnd.IntN(15)) * time.Minute)
		m.note("collect")
		m.may("collect", m.Collect(m.ctx))
	}
}

// work lets a workload on the first node begin, write, or end.
func (m *model) work() {
	v := m.pick(volumes)
	if v == nil {
		return
	}
	switch sure, attached := v.nodes["n1"]; {
	case m.staged[v.img.Handle] && m.rnd.IntN(4) == 0:
		m.unuse(v)
	case m.staged[v.img.Handle]:
		m.rewrite(v)
	case sure:
		m.use(v)
	case !attached && len(v.nodes) == 0:
		m.attach(v, "n1")
	}
}

func (m *model) rewrite(v *modelImage) {
	m.seeds++
	v.seed = m.seeds
	m.note("write %d into %s", v.seed, v.img.Handle)
	if !m.staged[v.img.Handle] {
		m.waitForMerges() // nobody writes to what is not in use, and who uses it stops them
	}
	m.write(v.img, v.seed)
}

// writable says whether a workload can write to an image.
func (m *model) writable(mi *modelImage) bool {
	return mi.img.Mutable && (m.kernel == nil || m.staged[mi.img.Handle] || len(mi.nodes) == 0)
}

// may fails for an error that no mishap explains. A merge may be in the way for a moment.
func (m *model) may(what string, err error) bool {
	m.t.Helper()
	m.note("  %s: %v", what, err)
	if m.kernel != nil && errors.Is(err, fault.Pending) {
		return false
	}
	if err != nil && m.control.hit() == "" {
		m.failf("%s: %v", what, err)
	}
	return err == nil
}

// result notes the outcome of an operation that makes an image.
func (m *model) result(what, name string, img image.Image, err error, seed uint64) {
	m.t.Helper()
	ok := m.may(what, err)
	k := what + " " + name
	switch {
	case ok:
		delete(m.unsure, k)
		m.images[img.Handle] = &modelImage{img: img, seed: seed, nodes: map[string]bool{}, size: []int64{img.Size}}
	case final(err):
		delete(m.unsure, k) // nothing remains
	default:
		m.unsure[k] = append(m.unsure[k], seed)
	}
}

// name is a new one, or one that was asked for without an answer. Few names
// are used, so that they come again after a deletion.
func (m *model) name(kind string) (string, bool) {
	n := fmt.Sprintf("n%d", m.rnd.IntN(20))
	for _, mi := range m.images {
		if mi.img.Name == n && (kind == "volume") == mi.img.Mutable {
			return "", false
		}
	}
	return n, true
}

func (m *model) createFrom(src *modelImage) {
	name, ok := m.name("volume")
	if !ok {
		return
	}
	domain, seed, from, size := m.domain(), uint64(0), image.Image{}, int64(mib)
	if src != nil {
		seed, from, size = src.seed, src.img, 0
	}
	m.note("create %s in %s from %s", name, domain, from.Handle)
	img, err := m.create(name, domain, from, size)
	if errors.Is(err, fault.Exists) && len(m.unsure["volume "+name]) > 0 {
		return // the one that was asked for before has come into being
	}
	m.result("volume", name, img, err, seed)
}

func (m *model) takeSnapshot() {
	v := m.pick(volumes)
	name, ok := m.name("snapshot")
	if v == nil || !ok {
		return
	}
	m.note("snapshot %s of %s", name, v.img.Handle)
	img, err := m.snap(name, v.img)
	if len(m.unsure["snapshot "+name]) > 0 {
		switch {
		case errors.Is(err, fault.Exists):
			return
		case err == nil: // it may be the first one, of an earlier content
			for _, seed := range m.unsure["snapshot "+name] {
				if m.holds(img, seed) == nil {
					m.result("snapshot", name, img, err, seed)
					return
				}
			}
		}
	}
	m.result("snapshot", name, img, err, v.seed)
}

func (m *model) takeGroup() {
	a := m.pick(volumes)
	if a == nil {
		return
	}
	b := m.pick(func(mi *modelImage) bool {
		return mi.img.Mutable && mi != a && mi.img.Handle.Domain == a.img.Handle.Domain
	})
	if b == nil {
		return
	}
	m.seeds++
	name := fmt.Sprintf("g%d", m.seeds) // never again: an unanswered one has no handle to delete it by
	m.note("group %s of %s and %s", name, a.img.Handle, b.img.Handle)
	request := image.GroupRequest{Name: name, Sources: []image.Handle{a.img.Handle, b.img.Handle}}
	g, err := m.CreateGroup(m.ctx, request)
	for try := 0; err != nil && m.control.hit() != "" && !final(err) && try < 5; try++ {
		m.note("  group: %v", err)
		m.control.arm(none, 0)
		m.again() // ask again until it is known
		g, err = m.CreateGroup(m.ctx, request)
	}
	if !m.may("group", err) {
		return
	}
	if len(g.Snapshots) != 2 {
		m.failf("group %s has %d members", g.Handle, len(g.Snapshots))
	}
	for _, img := range g.Snapshots {
		seed := a.seed
		if img.Source == b.img.Handle.String() {
			seed = b.seed
		}
		m.images[img.Handle] = &modelImage{img: img, seed: seed, nodes: map[string]bool{}, size: []int64{img.Size}}
		m.groups[g.Handle] = append(m.groups[g.Handle], img.Handle)
	}
}

func (m *model) expand(v *modelImage) {
	size := v.size[len(v.size)-1] + int64(m.rnd.IntN(3))*mib
	if size > 4*mib {
		return
	}
	m.note("expand %s to %d", v.img.Handle, size)
	img, err := m.Expand(m.ctx, v.img.Handle, size, 0)
	if m.may("expand", err) {
		if img.Size != size && img.Size < size {
			m.failf("%s has %d bytes after growing to %d", img.Handle, img.Size, size)
		}
		v.img, v.size = img, []int64{img.Size}
		return
	}
	v.size = append(v.size, size)
}

func (m *model) attachment(v *modelImage) {
	node := []string{"n1", "n2"}[m.rnd.IntN(2)]
	if m.rnd.IntN(2) == 0 {
		if m.staged[v.img.Handle] && node == "n1" {
			m.unuse(v)
		}
		m.note("detach %s from %s", v.img.Handle, node)
		if m.may("detach", m.Detach(m.ctx, v.img.Handle, node)) {
			delete(v.nodes, node)
		} else if _, was := v.nodes[node]; was {
			v.nodes[node] = false
		}
		return
	}
	m.attach(v, node)
}

func (m *model) attach(v *modelImage, node string) {
	m.note("attach %s to %s", v.img.Handle, node)
	_, err := m.Attach(m.ctx, v.img.Handle, node, m.access()[0], false)
	for other := range v.nodes {
		if other != node && errors.Is(err, fault.InUse) {
			return // attached there, or perhaps
		}
	}
	switch {
	case m.may("attach", err):
		v.nodes[node] = true
	case !final(err):
		v.nodes[node] = false
	}
}

// use stages a volume on the first node, where it is attached.
func (m *model) use(v *modelImage) {
	h := v.img.Handle
	m.note("stage %s", h)
	a, err := m.Attach(m.ctx, h, "n1", m.access()[0], false)
	if !m.may("attach again", err) {
		return
	}
	st, err := m.Stage(m.ctx, h, "n1", a.Generation)
	if m.may("stage", err) {
		m.kernel.stage(st, "n1")
		m.staged[h] = true
		m.stagings++
		if st.Told != 0 {
			m.may("built", m.Built(m.ctx, h, "n1", st.Told))
		}
	}
}

// unuse takes it down there. What the node says of that may be lost.
func (m *model) unuse(v *modelImage) {
	h := v.img.Handle
	m.note("unstage %s", h)
	m.kernel.unstage(h)
	delete(m.staged, h)
	if o, err := m.Outline(m.ctx, h, "n1"); m.may("outline", err) {
		m.may("unstaged", m.Unstaged(m.ctx, h, "n1", o.Told))
	}
}

func (m *model) remove() {
	if len(m.groups) > 0 && m.rnd.IntN(5) == 0 {
		g := slices.SortedFunc(maps.Keys(m.groups), func(a, b image.Handle) int {
			if a.String() < b.String() {
				return -1
			}
			return 1
		})[0]
		m.note("delete group %s", g)
		ok := m.may("delete group", m.DeleteGroup(m.ctx, g))
		for _, h := range m.groups[g] {
			if ok {
				delete(m.images, h)
			} else {
				m.perhaps[h] = true
			}
		}
		if ok {
			delete(m.groups, g)
		}
		return
	}
	mi := m.pick(standalone)
	if mi == nil {
		return
	}
	h := mi.img.Handle
	m.note("delete %s", h)
	var err error
	if mi.img.Mutable {
		err = m.DeleteVolume(m.ctx, h)
	} else {
		err = m.DeleteSnapshot(m.ctx, h)
	}
	if len(mi.nodes) > 0 {
		if errors.Is(err, fault.InUse) {
			return
		}
		for _, sure := range mi.nodes {
			if sure && err == nil {
				m.failf("%s was deleted while it was attached to %v", h, mi.nodes)
			}
		}
	}
	switch {
	case m.may("delete", err):
		delete(m.images, h)
	case !final(err):
		m.perhaps[h] = true
	}
}

// compare compares what is visible with the model.
func (m *model) compare() {
	m.t.Helper()
	seen := map[image.Handle]bool{}
	names := map[string]bool{}
	for _, img := range m.list(m.process) {
		seen[img.Handle] = true
		if k := key(img); img.Group == "" {
			if names[k] {
				m.failf("%s is visible twice", k)
			}
			names[k] = true
		}
		if img.State != image.Optimized && (m.kernel == nil || img.State != image.Degraded) {
			m.failf("%s is %s: %s", img.Handle, img.State, img.Reason)
		}
		mi := m.images[img.Handle]
		if mi == nil {
			m.adopt(img)
			continue
		}
		if err := m.holds(img, mi.seed); err != nil {
			m.failf("%v", err)
		}
		if !slices.Contains(mi.size, img.Size) {
			m.failf("%s has %d bytes, acknowledged were %v", img.Handle, img.Size, mi.size)
		}
		attached := map[string]bool{}
		for _, a := range img.Attachments {
			attached[a.Node] = true
			if _, may := mi.nodes[a.Node]; !may {
				m.failf("%s is attached to %s, which nobody asked for or which was ended", img.Handle, a.Node)
			}
		}
		for n, sure := range mi.nodes {
			if sure && !attached[n] {
				m.failf("%s is not attached to %s any more", img.Handle, n)
			}
		}
	}
	for h, mi := range m.images {
		if seen[h] {
			continue
		}
		if !m.perhaps[h] {
			m.failf("%s (%s) is lost", h, key(mi.img))
		}
		delete(m.images, h) // the deletion had happened
		delete(m.perhaps, h)
		for g, members := range m.groups {
			if slices.Contains(members, h) {
				delete(m.groups, g)
			}
		}
	}
}

// adopt takes an image into the model that came into being although its
// request was never answered.
func (m *model) adopt(img image.Image) {
	m.t.Helper()
	k := key(img)
	for _, seed := range m.unsure[k] {
		if m.holds(img, seed) == nil {
			m.images[img.Handle] = &modelImage{img: img, seed: seed, nodes: map[string]bool{}, size: []int64{img.Size}}
			delete(m.unsure, k)
			return
		}
	}
	m.failf("%s (%s) is visible, which nobody asked for or with wrong bytes (possible: %v)", k, img.Handle, m.unsure[k])
}

// end deletes everything: nothing may be left.
func (m *model) end() {
	m.t.Helper()
	m.waitForMerges()
	m.restart()
	m.compare()
	m.empty(slices.Collect(maps.Keys(m.groups))...)
	m.world.end()
}
