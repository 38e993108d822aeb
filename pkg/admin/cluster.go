package admin

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/quarry-csi/quarry/pkg/image"
)

// Kubernetes is the key in Checked.Unchecked when the cluster does not answer. No domain has such a name.
const Kubernetes = "Kubernetes"

// bindTime is how long an image may be there before Kubernetes has an object for it.
const bindTime = 10 * time.Minute

// strangers are images that no object of Kubernetes names, and objects whose image is not
// there, in the named domain or all. It only tells: nobody may delete by it, since a
// second cluster, or a person, may have the other half.
func (s server) strangers(ctx context.Context, domains []image.DomainInfo, only string) ([]image.Finding, error) {
	began := time.Now()
	// First the objects, then the images: those that were made between have their time.
	refs, err := s.cluster.References(ctx)
	if err != nil {
		return nil, err
	}
	c := known(domains, only)
	images := map[string]image.Image{}
	for _, i := range s.m.All(ctx) {
		images[i.Handle.String()] = i
	}
	var out []image.Finding
	named := map[string]bool{}
	for _, r := range refs {
		id, img, ok := strings.Cut(r.Handle, "/")
		if open, is := c.open[id]; is && ok {
			id = open
		}
		handle := id + "/" + img
		named[handle] = true
		if f := c.lost(r, id, handle, images); f != nil {
			out = append(out, *f)
		}
	}
	for handle, i := range images {
		if named[handle] || i.Name == "" || i.State == image.Creating || i.State == image.Deleting || began.Sub(i.Created) < bindTime || !c.asked(i.Handle.Domain) {
			continue
		}
		what := "VolumeSnapshotContent"
		if i.Mutable {
			what = "PersistentVolume"
		}
		out = append(out, stranger(i.Handle.Domain, i.Handle.Image, "no %s names %s %q: it was made by other means, or its object was deleted without it; make one for it (kubectl quarry import does that for volumes), or delete it", what, kindOf(i), i.Name))
	}
	return out, nil
}

func kindOf(i image.Image) string {
	if i.Mutable {
		return KindVolume
	}
	return KindSnapshot
}

func stranger(domain, object, format string, args ...any) image.Finding {
	return image.Finding{ID: strings.Join([]string{domain, Kubernetes, object}, ":"), Kind: image.FindingReport, Domain: domain, Object: object, Message: fmt.Sprintf(format, args...)}
}

// domainsKnown tells what a handle's domain is.
type domainsKnown struct {
	only       string
	open       map[string]string // every ID that an open domain has or had: its present one
	configured []string          // names and aliases, of those that are not open too
	chosen     map[string]bool   // IDs of those that are asked about
}

func known(domains []image.DomainInfo, only string) domainsKnown {
	c := domainsKnown{only: only, open: map[string]string{}, chosen: map[string]bool{}}
	for _, d := range domains {
		c.configured = append(append(c.configured, d.Config.Name), d.Config.Aliases...)
		if !d.Open {
			continue
		}
		c.chosen[d.ID] = only == "" || only == d.ID || only == d.Config.Name || slices.Contains(d.Config.Aliases, only)
		for _, name := range append([]string{d.Config.Name}, d.Config.Aliases...) {
			c.open[name+strings.TrimPrefix(d.ID, d.Config.Name)] = d.ID
		}
	}
	return c
}

// asked says whether a domain is open and one of those that are asked about.
func (c domainsKnown) asked(id string) bool { return c.chosen[id] }

// lost says what is wrong with the image of an object, or nil. Of a domain that is not open nothing is known.
func (c domainsKnown) lost(r Reference, domain, handle string, images map[string]image.Image) *image.Finding {
	object := r.Kind + "/" + r.Name
	name, _, _ := strings.Cut(domain, ".")
	var f image.Finding
	i, there := images[handle]
	switch {
	case r.Going:
		return nil
	case c.only == "" && !slices.Contains(c.configured, name):
		f = stranger(domain, object, "%s %s names image %s, whose domain is not configured: it is out of reach until it is", r.Kind, r.Name, r.Handle)
	case !c.asked(domain):
		return nil
	case !there || i.State == image.Deleting:
		f = stranger(domain, object, "%s %s names image %s, which is not there: it was deleted by other means, or its domain was put back from an older copy", r.Kind, r.Name, r.Handle)
	case i.Mutable == r.Snapshot:
		f = stranger(domain, object, "%s %s names image %s, which is a %s", r.Kind, r.Name, r.Handle, kindOf(i))
	default:
		return nil
	}
	return &f
}

// usage adds up by namespace and domain.
func (s server) usage(r *http.Request) (any, error) {
	type key struct{ namespace, domain string }
	by := map[key]*NamespaceUsage{}
	for _, u := range s.m.Usage(r.Context()) {
		k := key{u.Described.Namespace, u.Handle.Domain}
		n := by[k]
		if n == nil {
			n = &NamespaceUsage{Namespace: k.namespace, Domain: k.domain}
			by[k] = n
		}
		n.Promised += u.Promised
		n.Allocated += u.Allocated
		if !u.Measured {
			n.Unmeasured++
		}
		switch {
		case u.State == image.Creating, u.State == image.Deleting:
			continue
		case u.Mutable:
			n.Volumes++
		default:
			n.Snapshots++
		}
		n.Size += u.Size
	}
	out := []NamespaceUsage{}
	for _, n := range by {
		out = append(out, *n)
	}
	slices.SortFunc(out, func(a, b NamespaceUsage) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Domain, b.Domain))
	})
	return out, nil
}
