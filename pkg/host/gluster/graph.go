package gluster

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Brick is one of a volume's.
type Brick struct {
	Name string // "server:/path"
	Up   bool   // this client is connected to it
}

// Group is a set of bricks that keep the same files. A volume of several groups is distributed: each
// has a part of the files.
type Group struct {
	// Kind is "replicate", "disperse", or "" for a single brick.
	Kind   string
	Bricks []Brick
	// Up: files of this group can be used.
	Up bool
	// Arbiter: the last of the copies has names only, and decides who is right.
	Arbiter bool
	// Quorum is how many copies a write needs, of a replicate group: "none", "auto" (more than half), "fixed".
	Quorum string
	// Redundancy is how many bricks may be away, of a disperse group.
	Redundancy int
}

// State of a volume as one client sees it.
type State struct{ Groups []Group }

// Up says whether all of its files can be used.
func (s State) Up() bool {
	return len(s.Groups) > 0 && !slices.ContainsFunc(s.Groups, func(g Group) bool { return !g.Up })
}

// Splits says whether a group can have two versions of a file, each made while the other's copy was away.
func (g Group) Splits() bool {
	return g.Kind == "replicate" && !g.Arbiter && (g.Quorum == "none" || len(g.Bricks) == 2 && g.Quorum == "fixed")
}

// Look asks the client behind a mount what it knows of its bricks. Nobody else is asked, but on the way there the
// kernel looks at the mount's root, so it waits for bricks that hang: 10 s at most.
func (c *Client) Look(ctx context.Context, mount string) (State, error) {
	var s State
	err := c.local.Within(ctx, "ask the Gluster client of "+mount, quick, func() error {
		now, err := look(filepath.Join(mount, ".meta/graphs/active"))
		if err == nil {
			s = now
		}
		return err
	})
	if err != nil {
		return State{}, fault.New(fault.Unavailable, "ask the Gluster client of %s about its bricks: %w", mount, err)
	}
	return s, nil
}

// look reads a graph: a folder for each of the client's translators, named like the volume file has them.
func look(graph string) (State, error) {
	all, err := os.ReadDir(graph)
	if err != nil {
		return State{}, err
	}
	var s State
	var errs []error
	kinds, below := map[string]string{}, map[string]bool{}
	for _, e := range all {
		kind, err := os.ReadFile(filepath.Join(graph, e.Name(), "type"))
		if err != nil {
			continue // no translator
		}
		kinds[e.Name()] = strings.TrimSpace(string(kind))
		for _, n := range under(graph, e.Name()) {
			below[n] = strings.HasPrefix(kinds[e.Name()], "cluster/") || below[n]
		}
	}
	add := func(name string, up bool) {
		g, err := group(graph, name, kinds[name])
		g.Up = g.Up && up
		s.Groups, errs = append(s.Groups, g), append(errs, err)
	}
	for _, name := range slices.Sorted(maps.Keys(kinds)) {
		switch kind := kinds[name]; {
		case kind == "cluster/distribute":
			facts, err := private(graph, name)
			errs = append(errs, err)
			for i, n := range under(graph, name) {
				add(n, facts["subvolume_status["+strconv.Itoa(i)+"]"] == "1")
			}
		case !below[name] && (kind == "cluster/replicate" || kind == "cluster/disperse" || kind == "protocol/client"):
			add(name, true)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return State{}, err
	}
	if len(s.Groups) == 0 {
		return State{}, errors.New("its translators name no brick")
	}
	return s, nil
}

// group reads a replicate or disperse translator, or a client's of a single brick.
func group(graph, name, kind string) (Group, error) {
	facts, err := private(graph, name)
	if err != nil {
		return Group{}, err
	}
	if kind == "protocol/client" {
		b, err := brick(graph, name)
		return Group{Bricks: []Brick{b}, Up: b.Up}, err
	}
	g := Group{Kind: strings.TrimPrefix(kind, "cluster/"), Quorum: facts["quorum-type"], Up: facts["up"] == "1"}
	g.Arbiter = option(graph, name, "arbiter-count") == "1"
	g.Redundancy, _ = strconv.Atoi(facts["redundancy"]) // replicate has none
	if g.Kind == "replicate" {
		g.Up = false // "up" says that it was once
	}
	for i, n := range under(graph, name) {
		b, err := brick(graph, n)
		if err != nil {
			return Group{}, err
		}
		if up, ok := facts["child_up["+strconv.Itoa(i)+"]"]; ok {
			b.Up = up == "1"
			g.Up = g.Up || b.Up
		}
		g.Bricks = append(g.Bricks, b)
	}
	return g, nil
}

func brick(graph, name string) (Brick, error) {
	facts, err := private(graph, name)
	return Brick{Name: option(graph, name, "remote-host") + ":" + option(graph, name, "remote-subvolume"), Up: facts["connected"] == "1"}, err
}

// private reads what a translator says of itself, "name = value" in each line.
func private(graph, name string) (map[string]string, error) {
	b, err := os.ReadFile(filepath.Join(graph, name, "private"))
	if err != nil {
		return nil, err
	}
	facts := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), " = "); ok {
			facts[key] = value
		}
	}
	return facts, nil
}

// option that a translator was given; "" for none.
func option(graph, name, key string) string {
	b, err := os.ReadFile(filepath.Join(graph, name, "options", key))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// under names the translators below one, in their order.
func under(graph, name string) []string {
	var out []string
	for i := 0; ; i++ {
		to, err := os.Readlink(filepath.Join(graph, name, "subvolumes", strconv.Itoa(i)))
		if err != nil {
			return out
		}
		out = append(out, filepath.Base(to))
	}
}
