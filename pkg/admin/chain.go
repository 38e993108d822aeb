package admin

import (
	"slices"
	"strings"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// find picks the one image that a person means: by handle, by CSI name, or by
// the beginning of a handle, with or without its domain.
func find(images []Image, said string) (Image, error) {
	if said == "" {
		return Image{}, fault.New(fault.Invalid, "no image is named: its handle, the beginning of it, or its name")
	}
	var named, begun []Image
	for _, i := range images {
		_, id, _ := strings.Cut(i.Handle, "/")
		switch {
		case i.Handle == said:
			return i, nil
		case i.Name == said:
			named = append(named, i)
		case strings.HasPrefix(i.Handle, said), strings.HasPrefix(id, said):
			begun = append(begun, i)
		}
	}
	// A name used again: what is being deleted is not what is meant.
	if live := slices.DeleteFunc(slices.Clone(named), func(i Image) bool { return i.State == "deleting" }); len(live) > 0 {
		named = live
	}
	found := named
	if len(found) == 0 {
		found = begun
	}
	switch len(found) {
	case 0:
		return Image{}, fault.New(fault.NotFound, "image %q: no image of an open domain has this handle, beginning of a handle, or name", said)
	case 1:
		return found[0], nil
	}
	var handles []string
	for _, i := range found {
		handles = append(handles, i.Handle)
	}
	slices.Sort(handles)
	if more := len(handles) - 5; more > 0 {
		handles = append(handles[:5], "...")
	}
	return Image{}, fault.New(fault.Invalid, "image %q may be any of %d: say which: %s", said, len(found), strings.Join(handles, ", "))
}

// chainOf gathers an image's family: its sources up to the first that is
// there, and everything that came of it.
func chainOf(images []Image, of Image) Chain {
	byHandle := map[string]Image{}
	children := map[string][]Image{}
	for _, i := range images {
		byHandle[i.Handle] = i
		children[i.Source] = append(children[i.Source], i)
	}
	seen := map[string]bool{of.Handle: true}
	var ancestors []Image
	for at := of; at.Source != ""; {
		source, ok := byHandle[at.Source]
		if !ok || seen[source.Handle] {
			break
		}
		seen[source.Handle] = true
		ancestors = append(ancestors, source)
		at = source
	}
	slices.Reverse(ancestors)
	out := Chain{Image: of, Lineage: append(ancestors, of)}
	if out.Slabs = of.Slabs; len(out.Slabs) == 0 && of.Slab != "" {
		out.Slabs = []string{of.Slab} // of one that is half made or deleted
	}
	var descend func(Image)
	descend = func(i Image) {
		below := children[i.Handle]
		slices.SortFunc(below, func(a, b Image) int {
			if c := a.Created.Compare(b.Created); c != 0 {
				return c
			}
			return strings.Compare(a.Handle, b.Handle)
		})
		for _, c := range below {
			if !seen[c.Handle] {
				seen[c.Handle] = true
				out.Lineage = append(out.Lineage, c)
				descend(c)
			}
		}
	}
	descend(of)
	return out
}
