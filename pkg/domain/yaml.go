package domain

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"

	"go.yaml.in/yaml/v3"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// place is a value of a YAML file with the words to find it by.
type place struct {
	file   string
	domain string // name, once it is known
	path   string // "domains[1].params.path"
	node   *yaml.Node
}

// field is a place inside a mapping.
func (p place) field(name string, n *yaml.Node) place {
	p.node = n
	if p.path != "" {
		name = p.path + "." + name
	}
	p.path = name
	return p
}

// wrong makes the error for the value at p: file, line, domain, field, cause.
func (p place) wrong(format string, args ...any) error {
	where := p.file
	if p.node != nil && p.node.Line > 0 {
		where = fmt.Sprintf("%s:%d", where, p.node.Line)
	}
	if p.domain != "" {
		where += fmt.Sprintf(": domain %q", p.domain)
	}
	if p.path != "" {
		where += ": " + p.path
	}
	return fault.New(fault.Invalid, "%s: %w", where, fmt.Errorf(format, args...))
}

// parse reads exactly one YAML document. place.node is nil for an empty one.
func parse(file string, data []byte) (place, error) {
	p := place{file: file}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, second yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return p, nil
	case err != nil:
		return p, p.wrong("%w", err)
	}
	switch err := dec.Decode(&second); {
	case err == nil:
		p.node = &second
		return p, p.wrong("a second document begins here: one is allowed")
	case !errors.Is(err, io.EOF):
		return p, p.wrong("%w", err)
	}
	p.node = resolve(doc.Content[0])
	return p, nil
}

// resolve follows a YAML alias to its anchor.
func resolve(n *yaml.Node) *yaml.Node {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	return n
}

// fields returns the values of a mapping by key; a null value counts as
// missing. known nil allows any key.
func (p place) fields(known []string) (map[string]place, error) {
	if p.node.Kind != yaml.MappingNode {
		return nil, p.wrong("%s: must be a map", p.show())
	}
	out := map[string]place{}
	seen := map[string]int{}
	for i := 0; i+1 < len(p.node.Content); i += 2 {
		key, value := p.node.Content[i], resolve(p.node.Content[i+1])
		at := p.field(key.Value, key)
		if key.Kind != yaml.ScalarNode || key.ShortTag() != "!!str" {
			return nil, at.wrong("a key must be a string")
		}
		if line, twice := seen[key.Value]; twice {
			return nil, at.wrong("is given twice: line %d has it already", line)
		}
		seen[key.Value] = key.Line
		if known != nil && !slices.Contains(known, key.Value) {
			return nil, at.wrong("unknown field: %s", oneOf(known))
		}
		if value.ShortTag() != "!!null" {
			out[key.Value] = p.field(key.Value, value)
		}
	}
	return out, nil
}

// items returns the values of a list.
func (p place) items() ([]place, error) {
	if p.node.Kind != yaml.SequenceNode {
		return nil, p.wrong("%s: must be a list", p.show())
	}
	out := make([]place, len(p.node.Content))
	for i, n := range p.node.Content {
		out[i] = p
		out[i].path = fmt.Sprintf("%s[%d]", p.path, i)
		out[i].node = resolve(n)
	}
	return out, nil
}

// text returns a string; numbers and booleans must be quoted, because YAML
// would change their spelling (010, 1e3, yes).
func (p place) text() (string, error) {
	if p.node.Kind == yaml.ScalarNode && p.node.ShortTag() == "!!str" {
		return p.node.Value, nil
	}
	if p.node.Kind == yaml.ScalarNode && p.node.ShortTag() != "!!null" {
		return "", p.wrong("%s: must be a string: write it in quotes: %q", p.show(), p.node.Value)
	}
	return "", p.wrong("%s: must be a string", p.show())
}

func (p place) boolean() (bool, error) {
	if p.node.Kind == yaml.ScalarNode && p.node.ShortTag() == "!!bool" {
		return strconv.ParseBool(p.node.Value)
	}
	return false, p.wrong("%s: must be true or false", p.show())
}

// show renders the value for messages.
func (p place) show() string {
	switch p.node.Kind {
	case yaml.MappingNode:
		return "a map"
	case yaml.SequenceNode:
		return "a list"
	}
	if p.node.ShortTag() == "!!null" {
		return "nothing"
	}
	return fmt.Sprintf("value %q", p.node.Value)
}
