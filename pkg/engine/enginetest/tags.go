package enginetest

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// TestTagIsKeptExactly: rule 4.
func (s suite) TestTagIsKeptExactly(t *testing.T) {
	es := s.several(t, 2)
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	want := map[string]engine.Tag{}
	add := func(name, slab string, record []byte) {
		want[name] = engine.Tag{Name: name, Slab: slab, Record: record}
	}
	for n := 0; n <= engine.MaxRecord; n += s.pick(1, 32) { // 640 is a multiple of 32
		record := make([]byte, n)
		for i := range record {
			record[i] = byte(i*31 + n)
		}
		add(fmt.Sprintf("size.%d", n), fmt.Sprintf("s-%d", n), record)
	}
	add("bytes.all", "s", all)
	add("bytes.zeros", "s", make([]byte, engine.MaxRecord))
	add("bytes.newlines", "s", bytes.Repeat([]byte("\n\r\t \"'\\"), 50))
	add("bytes.ones", strings.Repeat("s", engine.MaxName), bytes.Repeat([]byte{0xff}, engine.MaxRecord))
	add("noslab", "", []byte("a tag need not point anywhere"))
	add("nothing", "", []byte{})
	var g errgroup.Group
	g.SetLimit(16)
	for _, tag := range want {
		g.Go(func() error { return es[0].CreateTag(t.Context(), tag) })
	}
	ok(t, g.Wait())
	for _, e := range es {
		have, err := e.ListTags(t.Context(), "")
		ok(t, err)
		if len(have) != len(want) {
			t.Errorf("%d tags are listed, %d were made", len(have), len(want))
		}
		for _, tag := range have {
			if w := want[tag.Name]; tag.Slab != w.Slab || tag.Record == nil || !bytes.Equal(tag.Record, w.Record) {
				t.Errorf("tag %q is listed as %q %x, made as %q %x", tag.Name, tag.Slab, tag.Record, w.Slab, w.Record)
			}
		}
	}
	fails(t, es[0].CreateTag(t.Context(), engine.Tag{Name: "size.641", Record: make([]byte, engine.MaxRecord+1)}), fault.Invalid)
	same(t, "tags after a record that is too long", tagNames(t, es[1], "size.641"), nil)
}

// TestTagIsExclusive: rule 3, with creators in several processes at once.
func (s suite) TestTagIsExclusive(t *testing.T) {
	es := s.several(t, 4)
	const creators = 16
	for round := range s.pick(10, 2) {
		name := fmt.Sprintf("race.%d", round)
		var mu sync.Mutex
		var won [][]byte
		var g errgroup.Group
		start := make(chan struct{})
		for i := range creators {
			g.Go(func() error {
				<-start
				record := fmt.Appendf(nil, "creator %d", i)
				err := es[i%len(es)].CreateTag(t.Context(), engine.Tag{Name: name, Slab: "s", Record: record})
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					won = append(won, record)
				} else if fault.KindOf(err) != fault.Exists {
					return err
				}
				return nil
			})
		}
		close(start)
		ok(t, g.Wait())
		if len(won) != 1 {
			t.Fatalf("%d creators won the name %q: %q", len(won), name, won)
		}
		for _, e := range es {
			tags, err := e.ListTags(t.Context(), name)
			ok(t, err)
			if len(tags) != 1 || !bytes.Equal(tags[0].Record, won[0]) {
				t.Fatalf("%q won, but the listing says %v", won[0], tags)
			}
		}
	}
}

// TestTagAfterALostReply: rule 3: the same tag again is success, anything else Exists.
func (s suite) TestTagAfterALostReply(t *testing.T) {
	es := s.several(t, 2)
	tag := engine.Tag{Name: "i.a.1", Slab: "slab-a", Record: []byte("nonce 1")}
	for _, e := range es {
		ok(t, e.CreateTag(t.Context(), tag))
		for _, other := range []engine.Tag{
			{Name: tag.Name, Slab: tag.Slab, Record: []byte("nonce 2")},
			{Name: tag.Name, Slab: tag.Slab, Record: []byte("nonce")},
			{Name: tag.Name, Slab: tag.Slab},
			{Name: tag.Name, Slab: "slab-b", Record: tag.Record},
			{Name: tag.Name, Record: tag.Record},
		} {
			fails(t, e.CreateTag(t.Context(), other), fault.Exists)
		}
	}
	tags, err := es[1].ListTags(t.Context(), "")
	ok(t, err)
	if len(tags) != 1 || tags[0].Slab != tag.Slab || !bytes.Equal(tags[0].Record, tag.Record) {
		t.Errorf("listed: %v, want only %v", tags, tag)
	}
}

// TestTagDelete: rule 2.
func (s suite) TestTagDelete(t *testing.T) {
	es := s.several(t, 2)
	for _, name := range []string{"i.a.1", "i.a.2", "x"} {
		ok(t, es[0].CreateTag(t.Context(), engine.Tag{Name: name}))
	}
	for _, e := range es {
		ok(t, e.DeleteTag(t.Context(), "i.a.1"))
		ok(t, e.DeleteTag(t.Context(), "x"))
		ok(t, e.DeleteTag(t.Context(), "never.was"))
		same(t, "tags that are left", tagNames(t, e, ""), []string{"i.a.2"})
	}
}

// TestTagOutlivesItsSlab: rule 4: tags and slabs do not know each other.
func (s suite) TestTagOutlivesItsSlab(t *testing.T) {
	s.kinds(t, func(t *testing.T, e engine.Engine, k engine.Kind) {
		ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "i.a.1", Slab: "a"}))
		create(t, e, "a", k, mib)
		ok(t, e.DeleteSlab(t.Context(), "a"))
		same(t, "tags", tagNames(t, e, ""), []string{"i.a.1"})
		create(t, e, "b", k, mib)
		ok(t, e.DeleteTag(t.Context(), "i.a.1"))
		same(t, "slabs", slabIDs(t, e), []string{"b"})
	})
}

// TestTagPrefixes: a listing by prefix is the part of the whole that begins with it.
func (s suite) TestTagPrefixes(t *testing.T) {
	e := s.one(t)
	names := []string{"e", "e.", "e.1", "e.10", "e.2", "e-1", "ea.1", "f.1", "i.vol.1", "i.vol.2", "i.vol-2.1", "i.volume.1"}
	for _, name := range names {
		ok(t, e.CreateTag(t.Context(), engine.Tag{Name: name}))
	}
	for _, prefix := range []string{"", "e", "e.", "e.1", "e.10", "e.100", "ea", "i.vol.", "i.vol", "i.", "zz", "zz.", "e..", "..", "../", "/", "E.", "*"} {
		want := slices.Sorted(slices.Values(slices.DeleteFunc(slices.Clone(names), func(n string) bool { return !strings.HasPrefix(n, prefix) })))
		same(t, fmt.Sprintf("tags that begin with %q", prefix), tagNames(t, e, prefix), want)
	}
}

// TestNamesOddButAllowed: the whole alphabet, the longest, and what looks like
// something else.
func (s suite) TestNamesOddButAllowed(t *testing.T) {
	open := s.domain(t)
	e := open()
	names := []string{"0", "a", "a.b", "a..b", "a.", "a-", "a_", "a.-_", "data", "spec", "tmp", "trash", "lost.found",
		"abcdefghijklmnopqrstuvwxyz0123456789._-", strings.Repeat("x", engine.MaxName), strings.Repeat("x", engine.MaxName-1),
		"y" + strings.Repeat(".", engine.MaxName-1), "i." + strings.Repeat("z", engine.MaxName-2)}
	slices.Sort(names)
	kinds := describe(t, e).Kinds
	var g errgroup.Group
	g.SetLimit(8)
	for i, name := range names {
		g.Go(func() error {
			return e.CreateTag(t.Context(), engine.Tag{Name: name, Slab: name, Record: []byte(name)})
		})
		g.Go(func() error {
			return e.CreateSlab(t.Context(), engine.SlabSpec{ID: name, Kind: kinds[i%len(kinds)], Size: mib})
		})
	}
	ok(t, g.Wait())
	for _, e := range []engine.Engine{e, open()} {
		same(t, "tags", tagNames(t, e, ""), names)
		same(t, "slabs", slabIDs(t, e), names)
	}
	for i, name := range names {
		if i%s.pick(1, 4) == 0 {
			attach(t, e, name)
			ok(t, e.DetachSlab(t.Context(), name))
			ok(t, e.ResizeSlab(t.Context(), name, 2*mib))
		}
		ok(t, e.DeleteSlab(t.Context(), name))
		ok(t, e.DeleteTag(t.Context(), name))
	}
	same(t, "tags at the end", tagNames(t, e, ""), nil)
	same(t, "slabs at the end", slabIDs(t, e), nil)
}

// TestNamesRefused: rule 7: every verb refuses what is outside the alphabet.
func (s suite) TestNamesRefused(t *testing.T) {
	e := s.one(t)
	kind := describe(t, e).Kinds[0]
	for _, name := range []string{"", ".", "..", ".a", "-a", "_a", "A", "aB", "a/b", "/", "../a", "a/../b", "a b", "a\x00", "a\n", "\x7f",
		"ä", "日本", "a\xff", "a*", "a:b", "a@b", "a+b", "a%2f", "a\\b", strings.Repeat("x", engine.MaxName+1), strings.Repeat("x", 5000)} {
		_, attachErr := e.AttachSlab(t.Context(), name, engine.AttachOptions{})
		for verb, err := range map[string]error{
			"CreateSlab": e.CreateSlab(t.Context(), engine.SlabSpec{ID: name, Kind: kind, Size: mib}),
			"ResizeSlab": e.ResizeSlab(t.Context(), name, mib),
			"DeleteSlab": e.DeleteSlab(t.Context(), name),
			"AttachSlab": attachErr,
			"DetachSlab": e.DetachSlab(t.Context(), name),
			"CreateTag":  e.CreateTag(t.Context(), engine.Tag{Name: name}),
			"DeleteTag":  e.DeleteTag(t.Context(), name),
		} {
			if err == nil || fault.KindOf(err) != fault.Invalid {
				t.Errorf("%s of %.40q: error %v, want kind %v", verb, name, err, fault.Invalid)
			}
		}
		if name != "" { // a tag need not point anywhere
			fails(t, e.CreateTag(t.Context(), engine.Tag{Name: "good", Slab: name}), fault.Invalid)
		}
	}
	same(t, "tags", tagNames(t, e, ""), nil)
	same(t, "slabs", slabIDs(t, e), nil)
}
