package block

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

func TestNamesFitAndTellWhatTheyAreOf(t *testing.T) {
	long := strings.Repeat("x", 128)
	for _, name := range []string{mark(Raw, long), slabMark(long + "/" + long)} {
		if len(name) > host.MaxMark {
			t.Errorf("mark %q has %d bytes, at most %d fit", name, len(name), host.MaxMark)
		}
	}
	for _, u := range uses {
		for _, name := range []string{mark(u, "d/v"), topUUID(u, "d/v")} {
			if got, ok := useOf(name); !ok || got != u {
				t.Errorf("%q is taken for use %q", name, string(got))
			}
			if domainOf(name) != "" {
				t.Errorf("the top %q is taken for a domain's device", name)
			}
		}
	}
	for _, name := range []string{slabMark("d/s"), slabUUID("d/s"), padOf(slabUUID("d/s"))} {
		if _, ok := useOf(name); ok {
			t.Errorf("%q is taken for a top", name)
		}
		if domainOf(name) != domainHash("d") {
			t.Errorf("%q is of domain %q, want %q", name, domainOf(name), domainHash("d"))
		}
	}
	for _, name := range []string{"", "quarry-", "QUARRY-f", "quarry-x-1", "LVM-abc", "QUARRY-c-f-00"} {
		if _, ok := useOf(name); ok {
			t.Errorf("%q is taken for a top", name)
		}
	}
	if padOf(slabUUID("d/s")) == slabUUID("d/s") || slabUUID("d/s") == slabUUID("d/t") {
		t.Error("two devices of one name")
	}
}

func TestTablesAreReadAsTheyAreMade(t *testing.T) {
	over, pad := slabUUID("d/s"), padOf(slabUUID("d/s"))
	for name, c := range map[string]struct {
		uuid  string
		table []host.Target
		want  table
	}{
		"none":            {over, nil, table{}},
		"linear":          {over, linear("7:1", 1<<20), table{kind: "linear", under: "7:1", length: 1 << 20}},
		"layer":           {over, layered("snapshot", "7:1", "7:2", 4096, 1<<20), table{kind: "snapshot", under: "7:1", store: "7:2", chunk: 4096, length: 1 << 20}},
		"merging":         {over, layered("snapshot-merge", "7:1", "7:2", 65536, 512), table{kind: "snapshot-merge", under: "7:1", store: "7:2", chunk: 65536, length: 512}},
		"pad":             {pad, padded("7:1", 512, 2048), table{kind: "pad", under: "7:1", length: 512}},
		"whole pad":       {pad, padded("7:1", 4096, 2048), table{kind: "pad", under: "7:1", length: 2048}},
		"zeros":           {over, []host.Target{{Length: 512, Type: "zero"}}, table{kind: "?"}},
		"a part":          {over, []host.Target{{Length: 512, Type: "linear", Params: "7:1 8"}}, table{kind: "?"}},
		"not persistent":  {over, []host.Target{{Length: 512, Type: "snapshot", Params: "7:1 7:2 N 8"}}, table{kind: "?"}},
		"two devices":     {over, append(linear("7:1", 512), host.Target{Start: 512, Length: 512, Type: "linear", Params: "7:2 0"}), table{kind: "?"}},
		"a padded layer":  {over, padded("7:1", 512, 2048), table{kind: "?"}},
		"another program": {over, []host.Target{{Length: 512, Type: "thin", Params: "253:1 7"}}, table{kind: "?"}},
	} {
		if got := read(host.Mapped{UUID: c.uuid, Targets: c.table}); got != c.want {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
	}
}

func TestContentIsFollowedThroughMergedLayersAndPads(t *testing.T) {
	mapped := func(minor uint32, uuid string, table []host.Target) host.Mapped {
		return host.Mapped{UUID: uuid, Major: 253, Minor: minor, Targets: table}
	}
	w := &world{mapped: []host.Mapped{
		mapped(1, slabUUID("d/merged"), linear("7:0", 512)),
		mapped(2, padOf(slabUUID("d/over")), padded("253:1", 512, 1024)),
		mapped(3, slabUUID("d/over"), layered("snapshot", "253:2", "7:1", 4096, 1024)),
		mapped(4, topUUID(Raw, "d/v"), linear("253:3", 1024)),
		mapped(5, slabUUID("d/circle"), linear("253:5", 512)), // the kernel does not allow it
	}}
	for num, want := range map[string]string{"7:0": "7:0", "253:1": "7:0", "253:2": "7:0", "253:3": "253:3", "253:4": "253:4", "253:5": "253:5", "8:1": "8:1"} {
		if got := w.content(num); got != want {
			t.Errorf("the content of %s is in %s, want %s", num, got, want)
		}
	}
}

func TestWhatCannotBeAChainIsRefused(t *testing.T) {
	raw, over := Slab{ID: "d/raw", Size: 4096}, Slab{ID: "d/over", Size: 8192, Chunk: 4096}
	if err := (Spec{Slabs: []Slab{over, raw}, Size: 8192}).check(); err != nil {
		t.Error(err)
	}
	for name, s := range map[string]Spec{
		"nothing":                  {Size: 512},
		"a circle":                 {Slabs: []Slab{over, over, raw}, Size: 4096},
		"no base":                  {Slabs: []Slab{over}, Size: 4096},
		"a base in the middle":     {Slabs: []Slab{over, raw, {ID: "d/x", Size: 512}}, Size: 4096},
		"no size":                  {Slabs: []Slab{raw}},
		"more than the head":       {Slabs: []Slab{raw}, Size: 8192},
		"half a sector":            {Slabs: []Slab{raw}, Size: 100},
		"a slab of half a sector":  {Slabs: []Slab{{ID: "d/x", Size: 700}}, Size: 512},
		"a slab without any bytes": {Slabs: []Slab{{ID: "d/x"}}, Size: 512},
	} {
		if s.check() == nil {
			t.Errorf("%s is a chain", name)
		}
	}
}

func TestDomainsWaitForThemselvesOnly(t *testing.T) {
	d := &Devices{}
	ctx := context.Background()
	unlock, err := d.lockDomains(ctx, []string{"a", "b", "a"})
	if err != nil {
		t.Fatal(err)
	}
	other, err := d.lockDomains(ctx, []string{"c"})
	if err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	if _, err := d.lockDomains(short, []string{"0", "b"}); !errors.Is(err, fault.Deadline) {
		t.Errorf("a domain that is busy: %v", err)
	}
	other()
	unlock()
	var inside atomic.Int32
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			names := []string{"a", "b"}
			if i%2 == 0 {
				names = []string{"b", "a"}
			}
			unlock, err := d.lockDomains(ctx, append(names, fmt.Sprint(i)))
			if err != nil {
				t.Error(err)
				return
			}
			if inside.Add(1) != 1 {
				t.Error("two are inside")
			}
			inside.Add(-1)
			unlock()
		})
	}
	wg.Wait()
	if len(d.busy) != 0 {
		t.Errorf("still busy are %v", d.busy)
	}
}
