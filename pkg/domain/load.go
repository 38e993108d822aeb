package domain

import (
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// knownFields of a domain.
func knownFields() []string {
	return []string{
		"name", "engine", "socket", "process", "params", "defaults", "secretsFile", "scope",
		"overcommit", "capacityLimit", "backgroundRate", "aliases", "takeOver",
	}
}

// maxName is the longest name of a domain in bytes: a DNS label's.
const maxName = 63

// statLimit is how long a domain's directory may take to answer.
const statLimit = 5 * time.Second

// Load reads and checks the domains file. Every error is fault.Invalid, one
// line, and says where: file, line, domain, field, value, what is allowed.
func Load(path string, reg Registry) ([]Entry, error) {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, fault.New(fault.Invalid, "domains file: %w", err)
	case !info.Mode().IsRegular():
		return nil, fault.New(fault.Invalid, "domains file %s is not a regular file", path)
	case info.Size() > maxFile:
		return nil, fault.New(fault.Invalid, "domains file %s has %d bytes: at most %d are allowed", path, info.Size(), maxFile)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fault.New(fault.Invalid, "domains file: %w", err)
	}
	root, err := parse(path, data)
	if err != nil {
		return nil, err
	}
	if root.node == nil {
		return nil, root.wrong("is empty: it must hold domains:, a list with at least one domain")
	}
	top, err := root.fields([]string{"domains"})
	if err != nil {
		return nil, err
	}
	list, ok := top["domains"]
	if !ok {
		return nil, root.wrong("domains: is missing: it must be a list with at least one domain")
	}
	items, err := list.items()
	if err != nil {
		return nil, err
	}
	if len(items) == 0 {
		return nil, list.wrong("is empty: it must hold at least one domain")
	}
	entries := make([]Entry, 0, len(items))
	taken := map[string]string{} // name or alias -> how it is taken
	for _, item := range items {
		e, fields, err := readEntry(item, reg, filepath.Dir(path))
		if err != nil {
			return nil, err
		}
		if err := claimNames(e, fields, taken); err != nil {
			return nil, err
		}
		for _, other := range entries {
			if sameStorage(reg, e, other) {
				at, ok := fields["params"]
				if !ok {
					at = fields["name"]
				}
				return nil, at.wrong("is the same storage as that of domain %q: a storage can be one domain only", other.Name)
			}
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// readEntry checks one item of the list by itself.
func readEntry(item place, reg Registry, dir string) (Entry, map[string]place, error) {
	e := Entry{Overcommit: 1, Params: map[string]string{}}
	fields, err := item.fields(knownFields())
	if err != nil {
		return e, nil, err
	}
	if e.Name, err = required(item, fields, "name"); err != nil {
		return e, nil, err
	}
	if err := checkName(fields["name"], e.Name); err != nil {
		return e, nil, err
	}
	for name, p := range fields { // from here on errors name the domain
		p.domain = e.Name
		fields[name] = p
	}
	item.domain = e.Name
	if err := readEngine(item, fields, reg, &e); err != nil {
		return e, nil, err
	}
	for _, read := range []struct {
		field string
		into  func(place) error
	}{
		{"params", func(p place) error { return readParams(p, reg, &e) }},
		{"defaults", func(p place) error {
			v, err := p.choice("allow", "native-only")
			e.NativeOnly = v == "native-only"
			return err
		}},
		{"scope", func(p place) error { e.Scope, err = p.choice(ScopeShared, ScopeNode); return err }},
		{"overcommit", func(p place) error { e.Overcommit, err = p.factor(); return err }},
		{"capacityLimit", func(p place) error { e.CapacityLimit, err = p.quantity(); return err }},
		{"backgroundRate", func(p place) error { e.BackgroundRate, err = p.quantity(); return err }},
		{"aliases", func(p place) error { e.Aliases, err = p.names(); return err }},
		{"takeOver", func(p place) error { e.TakeOver, err = p.boolean(); return err }},
		{"secretsFile", func(p place) error { e.Secrets, err = p.secrets(dir); return err }},
	} {
		if p, ok := fields[read.field]; ok {
			if err := read.into(p); err != nil {
				return e, nil, err
			}
		}
	}
	return e, fields, nil
}

func required(item place, fields map[string]place, name string) (string, error) {
	p, ok := fields[name]
	if !ok {
		return "", item.wrong("%s is missing", name)
	}
	return p.text()
}

func readParams(p place, reg Registry, e *Entry) error {
	known := slices.Sorted(maps.Keys(reg[e.Engine].params()))
	if e.Socket != "" {
		known = nil // only the process knows
	}
	values, err := p.fields(known)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		if strings.HasPrefix(name, reserved) {
			return values[name].wrong("is not allowed: names that begin with %s are Quarry's own", reserved)
		}
		if e.Params[name], err = values[name].text(); err != nil {
			return err
		}
	}
	return nil
}

func (p place) choice(allowed ...string) (string, error) {
	s, err := p.text()
	if err != nil {
		return "", err
	}
	if !slices.Contains(allowed, s) {
		return "", p.wrong("value %q is not allowed: %s", s, oneOf(allowed))
	}
	return s, nil
}

func (p place) factor() (float64, error) {
	tag := p.node.ShortTag()
	f, err := strconv.ParseFloat(p.node.Value, 64)
	if p.node.Kind != yaml.ScalarNode || tag != "!!int" && tag != "!!float" || err != nil || !(f > 0) || math.IsInf(f, 0) {
		return 0, p.wrong("%s: must be a number greater than 0, such as 1.5", p.show())
	}
	return f, nil
}

func (p place) quantity() (int64, error) {
	tag := p.node.ShortTag()
	if p.node.Kind != yaml.ScalarNode || tag != "!!int" && tag != "!!float" && tag != "!!str" {
		return 0, p.wrong("%s: must be a quantity of bytes, such as 100Gi", p.show())
	}
	n, err := ParseQuantity(p.node.Value)
	if err != nil {
		return 0, p.wrong("%w", err)
	}
	if n == 0 {
		return 0, p.wrong("%s: must be greater than 0; leave it out for no limit", p.show())
	}
	return n, nil
}

func (p place) names() ([]string, error) {
	items, err := p.items()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, item := range items {
		s, err := item.text()
		if err != nil {
			return nil, err
		}
		if err := checkName(item, s); err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}

func (p place) secrets(dir string) (Secrets, error) {
	path, err := p.text()
	if err != nil {
		return nil, err
	}
	if path == "" {
		return nil, p.wrong("value %q: must be the path of a file", path)
	}
	if !filepath.IsAbs(path) {
		path = filepath.Join(dir, path)
	}
	s, err := ReadSecrets(path)
	if err != nil {
		return nil, p.wrong("%w", err)
	}
	return s, nil
}

// checkName verifies a domain's name or alias: a DNS label.
func checkName(p place, s string) error {
	ok := len(s) >= 1 && len(s) <= maxName && s[0] != '-' && s[len(s)-1] != '-'
	for i := 0; ok && i < len(s); i++ {
		c := s[i]
		ok = c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-'
	}
	if !ok {
		return p.wrong("value %q is not allowed: 1 to %d characters of [a-z0-9-], beginning and ending with a letter or digit", s, maxName)
	}
	return nil
}

// claimNames makes names and aliases unique, because a handle begins with one.
func claimNames(e Entry, fields map[string]place, taken map[string]string) error {
	if how, twice := taken[e.Name]; twice {
		return fields["name"].wrong("value %q is %s already", e.Name, how)
	}
	taken[e.Name] = "the name of a domain"
	for _, a := range e.Aliases {
		if how, twice := taken[a]; twice {
			return fields["aliases"].wrong("value %q is %s already", a, how)
		}
		taken[a] = "an alias of domain " + strconv.Quote(e.Name)
	}
	return nil
}

// sameStorage says whether two entries would open the same storage: the same
// directory, however it is spelled or linked, the same place, or the same engine with the same
// parameters. What it cannot see (two names of one server) is caught by the
// domain's epoch.
func sameStorage(reg Registry, a, b Entry) bool {
	if a.Engine == b.Engine && a.Socket == b.Socket && maps.Equal(a.Params, b.Params) {
		return true
	}
	if p := reg.place(a); p != "" && p == reg.place(b) {
		return true
	}
	pa, pb := a.Params[reg[a.Engine].Directory], b.Params[reg[b.Engine].Directory]
	if pa == "" || pb == "" {
		return false
	}
	if filepath.Clean(pa) == filepath.Clean(pb) {
		return true
	}
	ia, ib := stat(pa), stat(pb)
	return ia != nil && ib != nil && os.SameFile(ia, ib)
}

// stat is nil for what is not there, or does not answer: a dead server's mount
// must not keep the other domains from opening.
func stat(path string) os.FileInfo {
	found := make(chan os.FileInfo, 1)
	go func() {
		info, err := os.Stat(path)
		if err != nil {
			info = nil
		}
		found <- info
	}()
	select {
	case info := <-found:
		return info
	case <-time.After(statLimit):
		return nil
	}
}
