package gluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/gluster"
)

// examine refuses a volume that can be no domain, and returns what an operator should know of it.
func (v *volume) examine(ctx context.Context, at string) (notes []string, err error) {
	s, err := v.look(ctx, at)
	if err != nil {
		return nil, err
	}
	if n := len(s.Groups); n > 1 {
		return nil, fault.Wrap(fault.Invalid, v.spread(n))
	}
	g := s.Groups[0]
	notes = append(notes, "bricks: "+layout(g))
	if g.Splits() {
		notes = append(notes, fmt.Sprintf("split brain is possible: %d copies without an arbiter and with cluster.quorum-type %q: two nodes that reach different bricks may each make the same tag, and Gluster keeps both: add an arbiter, or set cluster.quorum-type to \"auto\"", len(g.Bricks), g.Quorum))
	}
	return append(notes, "health: the bricks that this node reaches, how many files wait for healing by what one brick tells, and split brain of slabs and tags; the servers know more (\"gluster volume heal "+v.name+" info\")"), nil
}

// layout says in words where the copies are.
func layout(g gluster.Group) string {
	var bricks []string
	for _, b := range g.Bricks {
		bricks = append(bricks, b.Name)
	}
	on := strings.Join(bricks, ", ")
	switch {
	case g.Kind == "replicate" && g.Arbiter:
		return fmt.Sprintf("%d copies and an arbiter on %s", len(bricks)-1, on)
	case g.Kind == "replicate":
		return fmt.Sprintf("%d copies on %s", len(bricks), on)
	case g.Kind == "disperse":
		return fmt.Sprintf("dispersed, any %d of which may be away, on %s", g.Redundancy, on)
	}
	return "one copy on " + on
}

// health is share.Storage.Health.
func (v *volume) health(ctx context.Context) (string, error) {
	v.mu.Lock()
	at := v.at
	v.mu.Unlock()
	s, err := v.look(ctx, at)
	if err != nil {
		return "", err
	}
	if n := len(s.Groups); n > 1 {
		return v.spread(n).Error(), nil
	}
	var say []string
	away := 0
	for _, g := range s.Groups {
		for _, b := range g.Bricks {
			if b.Up {
				continue
			}
			away++
			say = append(say, fmt.Sprintf("brick %s cannot be reached from this node", b.Name))
		}
	}
	if away > 0 {
		say = append(say, fmt.Sprintf("look at \"gluster volume status %s\"", v.name))
	}
	if !s.Up() {
		return v.warning(say), nil
	}
	folders := []string{at, filepath.Join(at, "slabs"), filepath.Join(at, "tags")}
	pending, err := v.client.Pending(ctx, folders...)
	if err != nil || pending == 0 {
		return v.warning(say), err
	}
	say = append(say, fmt.Sprintf("%d or more files and folders of it wait to be healed", pending))
	if away > 0 {
		return v.warning(say), nil // nobody knows now which copies differ
	}
	objects := v.objects(ctx, folders)
	split, err := v.client.SplitBrain(ctx, objects)
	if err != nil {
		return v.warning(say), err
	}
	for i, p := range split {
		if split[i], err = filepath.Rel(at, p); err != nil {
			return v.warning(say), err
		}
	}
	if len(split) > 0 {
		say = append(say, fmt.Sprintf("split brain: the copies of %s differ, and Gluster does not know which is right: choose with \"gluster volume heal %s split-brain\"", strings.Join(split, ", "), v.name))
	}
	return v.warning(say), nil
}

func (v *volume) warning(say []string) string {
	if len(say) == 0 {
		return ""
	}
	return fmt.Sprintf("volume %s: %s", v.name, strings.Join(say, "; "))
}

// What is looked at for split brain: a volume with more to heal than that has it noticed soon enough.
const (
	mostObjects = 500
	lookLimit   = 5 * time.Second
)

// objects are the slabs and tags of the domain, and their folders.
func (v *volume) objects(ctx context.Context, folders []string) []string {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	out := folders
	for i := 1; i < len(out) && len(out) < mostObjects && ctx.Err() == nil; i++ {
		names, err := os.ReadDir(out[i])
		if err != nil {
			continue // a file, or what went meanwhile
		}
		tree := filepath.Base(filepath.Dir(out[i])) == "slabs" // what is in it is a user's
		for _, n := range names {
			if !tree {
				out = append(out, filepath.Join(out[i], n.Name()))
			}
		}
	}
	return out[:min(len(out), mostObjects)]
}
