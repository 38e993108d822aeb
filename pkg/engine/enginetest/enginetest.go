// Package enginetest is the conformance suite of engines: it checks every rule
// of package engine, and every capability that an engine declares.
//
// An engine's test is a Harness and a call of Run. Each method of suite whose
// name begins with Test is a test, on every engine, three times: as the engine is,
// by the engine protocol over a socket, and under engine.Minimal.
package enginetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// Harness is what the suite needs to know of an engine.
type Harness struct {
	// Domain makes a new, empty domain, and returns a function that opens it. That
	// is called several times, each time as another process or host would do it;
	// the suite closes what it opened. Room for 256 MiB is enough.
	Domain func(t testing.TB) (open func(t testing.TB) engine.Engine)
	// Expect is exactly what the engine can do natively, in any order: a
	// capability that vanishes fails the suite.
	Expect []engine.Capability
	// Foreign puts something that can be imported beside the slabs of the domain that Domain
	// made last, with a content, and returns its name. nil: nobody can; then of an engine
	// with "import" only that is checked which needs none.
	Foreign func(t testing.TB, content []byte) (source string)
	// Slow says that a verb takes the better part of a second: what else is tried
	// at every size and in many rounds is then tried at some sizes and in few.
	Slow bool
	// Behind says that the engine is behind a socket as it is: then it is not put behind
	// another one.
	Behind bool
	// Once runs the suite only as the engine is, not also over a socket and under engine.Minimal: the quick
	// form for a storage on which the whole takes many minutes.
	Once bool
}

// Run runs the suite.
func Run(t *testing.T, h Harness) {
	t.Run("native", func(t *testing.T) { suite{h}.run(t) })
	if h.Once {
		return
	}
	if !h.Behind {
		t.Run("socket", func(t *testing.T) { overSockets(h).run(t) })
	}
	t.Run("minimal", func(t *testing.T) {
		suite{Harness{Slow: h.Slow, Domain: func(t testing.TB) func(t testing.TB) engine.Engine {
			open := h.Domain(t)
			return func(t testing.TB) engine.Engine { return engine.Minimal(open(t)) }
		}}}.run(t)
	})
}

func overSockets(h Harness) suite {
	over := h
	over.Domain = func(t testing.TB) func(t testing.TB) engine.Engine {
		open := h.Domain(t)
		return func(t testing.TB) engine.Engine { return overSocket(t, open(t)) }
	}
	return suite{over}
}

type suite struct{ Harness }

// pick is many, or few where verbs are slow.
func (s suite) pick(many, few int) int {
	if s.Slow {
		return few
	}
	return many
}

func (s suite) run(t *testing.T) {
	v := reflect.ValueOf(s)
	for i := range v.NumMethod() {
		if name, ok := strings.CutPrefix(v.Type().Method(i).Name, "Test"); ok {
			test := v.Method(i).Interface().(func(*testing.T))
			t.Run(name, test)
		}
	}
}

// domain makes a domain and returns how to open it; what is opened is closed
// when the test ends.
func (s suite) domain(t *testing.T) func() engine.Engine {
	t.Helper()
	open := s.Domain(t)
	return func() engine.Engine {
		t.Helper()
		e := open(t)
		t.Cleanup(func() { ok(t, e.Close()) })
		return e
	}
}

// one opens a new domain once.
func (s suite) one(t *testing.T) engine.Engine {
	t.Helper()
	return s.domain(t)()
}

// several opens a new domain n times.
func (s suite) several(t *testing.T, n int) []engine.Engine {
	t.Helper()
	open := s.domain(t)
	var es []engine.Engine
	for range n {
		es = append(es, open())
	}
	return es
}

// TestDescription checks that a domain says sensible things of itself.
func (s suite) TestDescription(t *testing.T) {
	d := describe(t, s.one(t))
	if len(d.Kinds) == 0 {
		t.Error("no kind of slab")
	}
	for _, k := range d.Kinds {
		if k != engine.Block && k != engine.Tree {
			t.Errorf("kind %q is unknown", k)
		}
	}
	if d.Granularity < 512 || d.Granularity&(d.Granularity-1) != 0 {
		t.Errorf("granularity %d is no power of two of at least 512", d.Granularity)
	}
	if d.MaxSlabSize < 0 || d.MaxTags < 0 {
		t.Errorf("negative limits: %+v", d)
	}
	if d.Location == "" {
		t.Error("no location: a person cannot tell which storage it is")
	}
}

// TestCapabilitiesAreExactlyTheExpectedOnes keeps a capability from vanishing.
func (s suite) TestCapabilitiesAreExactlyTheExpectedOnes(t *testing.T) {
	e := s.one(t)
	have, want := engine.Discover(e).List(), slices.Clone(s.Expect)
	slices.Sort(have)
	slices.Sort(want)
	if !slices.Equal(have, want) {
		t.Errorf("capabilities %v, expected %v; notes: %q", have, want, describe(t, e).Notes)
	}
}

func describe(t *testing.T, e engine.Engine) engine.Description {
	t.Helper()
	d, err := e.Describe(t.Context())
	ok(t, err)
	return d
}

// kinds runs test for each kind of slab that the engine has.
func (s suite) kinds(t *testing.T, test func(t *testing.T, e engine.Engine, k engine.Kind)) {
	t.Helper()
	open := s.domain(t)
	for _, k := range describe(t, open()).Kinds {
		t.Run(string(k), func(t *testing.T) { test(t, s.one(t), k) })
	}
}

const mib = 1 << 20

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func fails(t *testing.T, err error, kinds ...fault.Kind) {
	t.Helper()
	if err == nil {
		t.Fatalf("success, but the error %v was expected", kinds)
	}
	for _, k := range kinds {
		if errors.Is(err, k) {
			return
		}
	}
	t.Fatalf("error %q is of kind %q, want one of %v", err, fault.KindOf(err), kinds)
}

func tagNames(t *testing.T, e engine.Engine, prefix string) []string {
	t.Helper()
	tags, err := e.ListTags(t.Context(), prefix)
	ok(t, err)
	names := []string{}
	for _, tag := range tags {
		names = append(names, tag.Name)
	}
	slices.Sort(names)
	return names
}

func slabIDs(t *testing.T, e engine.Engine) []string {
	t.Helper()
	ids := []string{}
	for id := range slabsOf(t, e) {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

func slabsOf(t *testing.T, e engine.Engine) map[string]engine.Slab {
	t.Helper()
	slabs, err := e.ListSlabs(t.Context())
	ok(t, err)
	m := map[string]engine.Slab{}
	for _, slab := range slabs {
		if _, twice := m[slab.ID]; twice {
			t.Errorf("slab %q is listed twice", slab.ID)
		}
		m[slab.ID] = slab
	}
	return m
}

func same[T any](t *testing.T, what string, have, want []T) {
	t.Helper()
	if !reflect.DeepEqual(append([]T{}, have...), append([]T{}, want...)) {
		t.Errorf("%s: have %v, want %v", what, have, want)
	}
}

func create(t *testing.T, e engine.Engine, id string, k engine.Kind, size int64) engine.SlabSpec {
	t.Helper()
	spec := engine.SlabSpec{ID: id, Kind: k, Size: size}
	ok(t, e.CreateSlab(t.Context(), spec))
	return spec
}

// attach returns the path of a slab, which is detached when the test ends.
func attach(t *testing.T, e engine.Engine, id string) string {
	t.Helper()
	a, err := e.AttachSlab(t.Context(), id, engine.AttachOptions{})
	ok(t, err)
	t.Cleanup(func() { ok(t, e.DetachSlab(context.WithoutCancel(t.Context()), id)) })
	return a.Path
}

// put writes data into a slab, durably: at an offset of a block slab, or as the
// file named by the offset of a tree slab.
func put(t *testing.T, path string, k engine.Kind, offset int64, data []byte) {
	t.Helper()
	flags := os.O_WRONLY
	if k == engine.Tree {
		path, offset, flags = fmt.Sprintf("%s/%d", path, offset), 0, os.O_WRONLY|os.O_CREATE
	}
	f, err := os.OpenFile(path, flags, 0o644)
	ok(t, err)
	_, err = f.WriteAt(data, offset)
	ok(t, errors.Join(err, f.Sync(), f.Close()))
}

// has checks that a slab holds what put wrote.
func has(t *testing.T, path string, k engine.Kind, offset int64, want []byte) {
	t.Helper()
	name, at := path, offset
	if k == engine.Tree {
		name, at = fmt.Sprintf("%s/%d", path, offset), 0
	}
	f, err := os.Open(name)
	ok(t, err)
	defer f.Close()
	have := make([]byte, len(want))
	if _, err := f.ReadAt(have, at); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	if !bytes.Equal(have, want) {
		t.Fatalf("%s at %d holds %.32x..., want %.32x...", name, at, have, want)
	}
}

// zero checks that a block slab reads as zero from offset for length bytes.
func zero(t *testing.T, path string, offset, length int64) {
	t.Helper()
	has(t, path, engine.Block, offset, make([]byte, length))
}

func sizeOf(t *testing.T, path string) int64 {
	t.Helper()
	f, err := os.Open(path)
	ok(t, err)
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	ok(t, err)
	return size
}

func pattern(seed byte, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = seed + byte(i*7)
	}
	return p
}
