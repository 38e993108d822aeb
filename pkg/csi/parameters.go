package csi

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// The parameters of classes. Every other key of a storage class is the engine's.
const (
	paramDomain           = "domain"
	paramDomains          = "domains"
	paramEncrypted        = "encrypted"
	paramLayout           = "layout"
	paramRequireNative    = "requireNative"
	paramRestorePlacement = "restorePlacement"
	paramThinLayers       = "thinLayers"
	paramChainLimit       = "chainLimit"
	paramQuiesceLimit     = "quiesceLimit"
	paramInexact          = "inexact"

	// metadataPrefix begins the keys that the sidecars add of their own accord.
	metadataPrefix = "csi.storage.k8s.io/"
)

const (
	maxChainLimit   = 64               // layers; each costs a lookup per read
	maxQuiesceLimit = 10 * time.Minute // nobody writes for that long
)

// class is a storage class's parameters.
type class struct {
	domains         []string
	layout          image.Layout
	requireNative   []engine.Capability
	restoreToSource bool
	encrypted       bool
	thinLayers      bool
	tuning          image.Tuning
	engine          map[string]string
	described       image.Described
}

// parseClass reads the parameters of a storage class; mutable ones take precedence.
func parseClass(params, mutable map[string]string) (class, error) {
	c := class{engine: map[string]string{}}
	if err := checkMap("parameters", params); err != nil {
		return c, err
	}
	tuning := map[string]string{}
	for _, k := range slices.Sorted(maps.Keys(params)) {
		v := params[k]
		var err error
		switch {
		case strings.HasPrefix(k, metadataPrefix):
			describe(&c.described, strings.TrimPrefix(k, metadataPrefix), v)
		case k == paramDomain:
			c.domains, err = names(k, v, false)
		case k == paramDomains:
			c.domains, err = names(k, v, true)
		case k == paramLayout:
			c.layout = image.Layout(v)
			if c.layout != image.LayoutImage && c.layout != image.LayoutDirectory {
				err = unknownValue(k, v, string(image.LayoutImage), string(image.LayoutDirectory))
			}
		case k == paramRequireNative:
			c.requireNative, err = natives(v)
		case k == paramRestorePlacement:
			c.restoreToSource = v == "source"
			if v != "source" && v != "move" {
				err = unknownValue(k, v, "move", "source")
			}
		case k == paramEncrypted:
			c.encrypted, err = yes(k, v)
		case k == paramThinLayers:
			c.thinLayers, err = yes(k, v)
		case k == paramChainLimit || k == paramQuiesceLimit:
			tuning[k] = v
		default:
			c.engine[k] = v
		}
		if err != nil {
			return c, err
		}
	}
	if params[paramDomain] != "" && params[paramDomains] != "" {
		return c, fault.New(fault.Invalid, "parameters %q and %q exclude each other", paramDomain, paramDomains)
	}
	maps.Copy(tuning, mutable)
	var err error
	var rest map[string]string
	if c.tuning, rest, err = parseTuning(tuning); err != nil {
		return c, err
	}
	// What an engine's Modifier takes belongs to a volume that exists: it can
	// be neither verified nor undone before.
	for _, k := range slices.Sorted(maps.Keys(rest)) {
		return c, fault.New(fault.Invalid, "mutable parameter %q is unknown at creation: known are %s, %s", k, paramChainLimit, paramQuiesceLimit)
	}
	return c, nil
}

// parseTuning reads mutable parameters; rest is what is not Quarry's own.
func parseTuning(mutable map[string]string) (t image.Tuning, rest map[string]string, err error) {
	if err := checkMap("mutable_parameters", mutable); err != nil {
		return t, nil, err
	}
	rest = map[string]string{}
	for k, v := range mutable {
		switch k {
		case paramChainLimit:
			n, err := strconv.Atoi(v)
			if err != nil || n < 1 || n > maxChainLimit {
				return t, nil, fault.New(fault.Invalid, "parameter %s=%q: a number from 1 to %d is allowed", k, v, maxChainLimit)
			}
			t.ChainLimit = n
		case paramQuiesceLimit:
			d, err := time.ParseDuration(v)
			if err != nil || d < time.Millisecond || d > maxQuiesceLimit {
				return t, nil, fault.New(fault.Invalid, `parameter %s=%q: a duration from "1ms" to %q is allowed, such as "10s"`, k, v, maxQuiesceLimit)
			}
			t.QuiesceLimit = d
		default:
			if !strings.HasPrefix(k, metadataPrefix) {
				rest[k] = v
			}
		}
	}
	return t, rest, nil
}

// snapshotClass is a snapshot class's parameters.
type snapshotClass struct {
	inexact       bool
	requireNative []engine.Capability
	described     image.Described
}

func parseSnapshotClass(params map[string]string) (snapshotClass, error) {
	var c snapshotClass
	if err := checkMap("parameters", params); err != nil {
		return c, err
	}
	for _, k := range slices.Sorted(maps.Keys(params)) {
		v := params[k]
		var err error
		switch {
		case strings.HasPrefix(k, metadataPrefix):
			describe(&c.described, strings.TrimPrefix(k, metadataPrefix), v)
		case k == paramInexact:
			c.inexact = v == "allow"
			if v != "allow" && v != "refuse" {
				err = unknownValue(k, v, "allow", "refuse")
			}
		case k == paramRequireNative:
			c.requireNative, err = natives(v)
		default:
			err = fault.New(fault.Invalid, "parameter %q of the snapshot class is unknown: known are %s, %s", k, paramInexact, paramRequireNative)
		}
		if err != nil {
			return c, err
		}
	}
	return c, nil
}

// describe takes what the sidecars tell about the object of the user.
func describe(d *image.Described, key, value string) {
	switch key {
	case "pvc/namespace", "volumesnapshot/namespace", "volumegroupsnapshot/namespace":
		d.Namespace = value
	case "pvc/name", "volumesnapshot/name", "volumegroupsnapshot/name":
		d.Claim = value
	case "pv/name", "volumesnapshotcontent/name", "volumegroupsnapshotcontent/name":
		d.Volume = value
	}
}

// checkEngineParams refuses class parameters that no domain of the class
// takes. A domain that is not open cannot say what it takes: then the Image
// Manager decides.
func (s *Server) checkEngineParams(c class) error {
	if len(c.engine) == 0 {
		return nil
	}
	known := []string{paramDomain, paramDomains, paramEncrypted, paramLayout, paramRequireNative, paramRestorePlacement, paramThinLayers, paramChainLimit, paramQuiesceLimit}
	for _, d := range s.cfg.Manager.KnownDomains() {
		if !c.places(d) {
			continue
		}
		if !d.Open {
			return nil
		}
		known = slices.AppendSeq(known, maps.Keys(d.Description.Params))
	}
	slices.Sort(known)
	known = slices.Compact(known)
	for _, k := range slices.Sorted(maps.Keys(c.engine)) {
		if !slices.Contains(known, k) {
			return fault.New(fault.Invalid, "parameter %q is unknown: known are %s", k, strings.Join(known, ", "))
		}
	}
	return nil
}

// places says whether a volume of the class may be placed on a domain.
func (c class) places(d image.DomainInfo) bool {
	if len(c.domains) == 0 {
		return true
	}
	is := func(name string) bool { return slices.Contains(c.domains, name) }
	return is(d.ID) || is(d.Config.Name) || slices.ContainsFunc(d.Config.Aliases, is)
}

// names reads one domain, or a list separated by commas.
func names(key, v string, list bool) ([]string, error) {
	parts := []string{v}
	if list {
		parts = strings.Split(v, ",")
	}
	var out []string
	for _, p := range parts {
		p = strings.TrimSpace(p)
		if err := engine.CheckName("parameter "+key+": domain", p); err != nil {
			return nil, err
		}
		if slices.Contains(out, p) {
			return nil, fault.New(fault.Invalid, "parameter %s=%q names %q twice", key, v, p)
		}
		out = append(out, p)
	}
	return out, nil
}

// natives reads a list of capabilities separated by commas.
func natives(v string) ([]engine.Capability, error) {
	known := []string{
		string(engine.CapSnapshot), string(engine.CapClone), string(engine.CapCopy), string(engine.CapMeter), string(engine.CapQuota),
		string(engine.CapDiff), string(engine.CapFence), string(engine.CapGroup), string(engine.CapModify), string(engine.CapImport),
	}
	var out []engine.Capability
	for _, p := range strings.Split(v, ",") {
		p = strings.TrimSpace(p)
		if !slices.Contains(known, p) {
			return nil, unknownValue(paramRequireNative, p, known...)
		}
		out = append(out, engine.Capability(p))
	}
	return out, nil
}

// yes reads "true" or "false".
func yes(key, v string) (bool, error) {
	if v != "true" && v != "false" {
		return false, unknownValue(key, v, "true", "false")
	}
	return v == "true", nil
}

func unknownValue(key, value string, known ...string) error {
	return fault.New(fault.Invalid, "parameter %s=%q is unknown: known are %s", key, value, strings.Join(known, ", "))
}

func checkMap(field string, m map[string]string) error {
	n := 0
	for k, v := range m {
		n += len(k) + len(v)
	}
	if n > maxMap {
		return fault.New(fault.Invalid, "%s has %d bytes: at most %d are allowed", field, n, maxMap)
	}
	return nil
}
