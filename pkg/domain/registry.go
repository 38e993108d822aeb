package domain

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// Scopes of a domain.
const (
	ScopeShared = "shared"
	ScopeNode   = "node"
)

// Factory opens domains of one type of storage.
type Factory struct {
	// Open makes an engine of checked params. fault.Unavailable: the storage
	// cannot be reached now; any other error will not go away by itself.
	Open func(ctx context.Context, params map[string]string, secrets map[string]string) (engine.Engine, error)
	// Params are the parameters taken, with one line of help each; nil: none.
	Params func() map[string]string
	// Scope that a domain has unless it says so itself; "" means ScopeShared.
	Scope string
	// Directory names the parameter that is a directory on this host, or is
	// empty: no two domains may have the same one. In a process of its own the
	// engine writes there only.
	Directory string
	// Place is where the storage of checked params is, in words that are the same for two entries
	// of the same storage, also of two types ("nfs://nas/export/k8s"): no two domains may have the same.
	// nil, and "": nothing can be said, or Directory says it.
	Place func(params map[string]string) string
	// Needs are the capabilities (capabilities(7), by number) that the engine has to have in a
	// process of its own; nil: all.
	Needs []uint
}

func (f Factory) params() map[string]string {
	if f.Params == nil {
		return nil
	}
	return f.Params()
}

// place is where the storage of an entry is, or "".
func (r Registry) place(e Entry) string {
	if f := r[e.Engine]; f.Place != nil && e.Socket == "" {
		return f.Place(maps.Clone(e.Params))
	}
	return ""
}

// Registry holds the types of storage that a program was built with, by the
// name that the domains file uses. The commands make it.
type Registry map[string]Factory

// Engines names the types in order.
func (r Registry) Engines() []string { return slices.Sorted(maps.Keys(r)) }

// CheckParams verifies an engine's type and its parameters' names. The error
// is fault.Invalid and names what is known.
func (r Registry) CheckParams(engineType string, params map[string]string) error {
	f, ok := r[engineType]
	if !ok {
		return fault.New(fault.Invalid, "engine %q is unknown: %s", engineType, oneOf(r.Engines()))
	}
	known := f.params()
	for _, p := range slices.Sorted(maps.Keys(params)) {
		if _, ok := known[p]; !ok {
			return fault.New(fault.Invalid, "parameter %q is unknown to engine %q: %s", p, engineType, oneOf(slices.Sorted(maps.Keys(known))))
		}
	}
	return nil
}

// Open opens the domain of an entry. The error names the domain and has the
// engine's kind: fault.Unavailable is worth another try later.
func (r Registry) Open(ctx context.Context, e Entry) (engine.Engine, error) {
	f, ok := r[e.Engine]
	if !ok {
		return nil, fault.In(r.CheckParams(e.Engine, nil), "open", e.Name, "")
	}
	opened, err := f.Open(ctx, maps.Clone(e.Params), e.Secrets)
	if err != nil {
		return nil, fault.In(err, "open", e.Name, "")
	}
	return opened, nil
}

// Entry is one domain of the file, checked, with every default filled in.
type Entry struct {
	Name string
	// Engine is the type; SocketEngine where only the process at Socket knows.
	Engine string
	// Socket of somebody else's process that is the engine; "": none.
	Socket string
	// Process says that the engine has a process of its own, which Quarry starts.
	Process       bool
	Params        map[string]string
	NativeOnly    bool
	Scope         string // ScopeShared or ScopeNode
	Overcommit    float64
	CapacityLimit int64 // bytes; 0: the storage's own
	// BackgroundRate of merging and flattening, bytes per second; 0: as fast as it goes.
	BackgroundRate int64
	Aliases        []string
	TakeOver       bool
	Secrets        Secrets
}

// Config is the Image Manager's view of the entry on a node.
func (e Entry) Config(node string) image.DomainConfig {
	c := image.DomainConfig{
		Name: e.Name, Engine: e.Engine, Scope: e.Scope, NativeOnly: e.NativeOnly,
		Overcommit: e.Overcommit, CapacityLimit: e.CapacityLimit, BackgroundRate: e.BackgroundRate,
		Aliases: slices.Clone(e.Aliases), TakeOver: e.TakeOver,
	}
	if e.Scope == ScopeNode {
		c.Node = node
	}
	return c
}

// SameStorage says whether two entries of one name open the same storage in the same way, so that
// one can become the other while it is open.
func (e Entry) SameStorage(o Entry) bool {
	return e.Name == o.Name && e.Engine == o.Engine && e.Socket == o.Socket && e.Process == o.Process && e.Scope == o.Scope && maps.Equal(e.Params, o.Params) && maps.Equal(e.Secrets, o.Secrets)
}

// Equal says whether two entries say the same.
func (e Entry) Equal(o Entry) bool {
	return e.SameStorage(o) && e.NativeOnly == o.NativeOnly && e.Overcommit == o.Overcommit && e.CapacityLimit == o.CapacityLimit &&
		e.BackgroundRate == o.BackgroundRate && slices.Equal(e.Aliases, o.Aliases) && e.TakeOver == o.TakeOver
}

// Secrets are never shown: however they are formatted or encoded, only their
// number appears.
type Secrets map[string]string

// Format implements fmt.Formatter for every verb.
func (s Secrets) Format(w fmt.State, _ rune) { _, _ = w.Write([]byte(s.hidden())) }

// MarshalJSON implements json.Marshaler.
func (s Secrets) MarshalJSON() ([]byte, error) { return json.Marshal(s.hidden()) }

func (s Secrets) hidden() string {
	if len(s) == 1 {
		return "(1 secret)"
	}
	return fmt.Sprintf("(%d secrets)", len(s))
}

// oneOf renders what is allowed, for messages.
func oneOf(known []string) string {
	switch len(known) {
	case 0:
		return "none is known"
	case 1:
		return fmt.Sprintf("only %q is known", known[0])
	}
	quoted := make([]string, len(known))
	for i, k := range known {
		quoted[i] = fmt.Sprintf("%q", k)
	}
	return "known are " + strings.Join(quoted, ", ")
}
