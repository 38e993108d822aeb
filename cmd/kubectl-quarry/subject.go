package main

import (
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/quarry-csi/quarry/cmd/internal/engines"
	"github.com/quarry-csi/quarry/pkg/domain"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/remote"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// newName in a parameter's value is replaced by another name for each domain.
const newName = "{}"

// subject is what an engine check is about: a storage, and how it gets new domains.
type subject struct {
	// Engine is the type: one of Quarry's own, or with Socket what its process has to be; "": any.
	Engine, Socket string
	Params         map[string]string
	// Directory is the parameter that is a directory; "": there is none.
	Directory   string
	SecretsFile string
	// Scratch is the directory in which domains are made.
	Scratch string
}

// checkable names the engines that keep a domain in a directory.
func checkable() []string {
	reg := engines.Registry(host.Exec{})
	return slices.DeleteFunc(reg.Engines(), func(name string) bool { return reg[name].Directory == "" })
}

func parseParams(said []string) (map[string]string, error) {
	out := map[string]string{}
	for _, p := range said {
		name, value, ok := strings.Cut(p, "=")
		if _, twice := out[name]; !ok || name == "" || twice {
			return nil, fault.New(fault.Invalid, "--param %q: must be NAME=VALUE, once for each name", p)
		}
		out[name] = value
	}
	return out, nil
}

// prepare checks what was said, and makes the directory for domains; remove removes that.
func (s *subject) prepare() (remove func() error, err error) {
	none := func() error { return nil }
	if s.Socket == "" {
		if s.Engine == "" {
			return none, fault.New(fault.Invalid, "what is to be checked? An engine (%s), or --socket", strings.Join(checkable(), ", "))
		}
		reg := engines.Registry(host.Exec{})
		if err := reg.CheckParams(s.Engine, s.Params); err != nil {
			return none, err
		}
		if s.SecretsFile != "" {
			return none, fault.New(fault.Invalid, "--secrets-file %q: it goes with --socket only", s.SecretsFile)
		}
		if s.Directory = reg[s.Engine].Directory; s.Directory == "" {
			return none, fault.New(fault.Unsupported, "engine %q does not keep a domain in a directory: %s can be checked here, and any behind a --socket", s.Engine, strings.Join(checkable(), ", "))
		}
	} else {
		if s.Socket, err = filepath.Abs(s.Socket); err != nil {
			return none, fault.New(fault.Invalid, "--socket: %w", err)
		}
		if _, err := s.secrets(); err != nil {
			return none, err
		}
		if _, there := s.Params[s.Directory]; !there {
			if !slices.ContainsFunc(slices.Collect(maps.Values(s.Params)), func(v string) bool { return strings.Contains(v, newName) }) {
				return none, fault.New(fault.Invalid, "the suite needs many new, empty domains, and no parameter makes one: give --param %s=/a/directory (--directory says which parameter is one), or write %s into a parameter's value", s.Directory, newName)
			}
			s.Directory = ""
			return none, nil
		}
	}
	at := s.Params[s.Directory]
	if !filepath.IsAbs(at) {
		return none, fault.New(fault.Invalid, "--param %s=%q: the absolute path of an existing directory is needed", s.Directory, at)
	}
	if s.Scratch, err = newDirectory(at, "quarry-engine-check-"); err != nil {
		return none, fault.New(fault.Invalid, "a directory to check in: %w", err)
	}
	return func() error { return os.RemoveAll(s.Scratch) }, nil
}

// newDirectory makes one for whoever has that in which it is: an engine may have a user of its own.
func newDirectory(in, prefix string) (string, error) {
	info, err := os.Stat(in)
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(in, prefix)
	if err != nil {
		return "", err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && os.Geteuid() == 0 {
		err = os.Chown(dir, int(st.Uid), int(st.Gid))
	}
	return dir, errors.Join(err, os.Chmod(dir, info.Mode().Perm()&^0o022))
}

// domain makes a new, empty domain: its parameters, and what to do when it is not needed any more.
func (s *subject) domain(ctx context.Context) (params map[string]string, end func() error, err error) {
	params = maps.Clone(s.Params)
	if s.Directory != "" {
		params[s.Directory], err = newDirectory(s.Scratch, "domain-")
		return params, func() error { return nil }, err
	}
	name := "quarry-check-" + strings.ToLower(rand.Text())
	for key, value := range params {
		params[key] = strings.ReplaceAll(value, newName, name)
	}
	// An engine that does not heed the name has opened somebody's domain: that must not be emptied.
	if err := s.isEmpty(ctx, params); err != nil {
		return nil, nil, err
	}
	return params, func() error { return s.empty(ctx, params) }, nil
}

// isEmpty refuses a domain that is not new.
func (s *subject) isEmpty(ctx context.Context, params map[string]string) error {
	e, _, err := s.open(ctx, params, "check-begin")
	if err != nil {
		return err
	}
	slabs, err := e.ListSlabs(ctx)
	tags, tagsErr := e.ListTags(ctx, "")
	err = errors.Join(err, tagsErr, e.Close())
	if err == nil && len(slabs)+len(tags) > 0 {
		err = fault.New(fault.Invalid, "parameters %v: a new name stands where %s stood, and the domain that the engine opened has %d slabs and %d tags: nothing is tried there; write %s where the engine makes another domain of it",
			params, newName, len(slabs), len(tags), newName)
	}
	return err
}

// empty deletes what is in a domain.
func (s *subject) empty(ctx context.Context, params map[string]string) error {
	e, _, err := s.open(ctx, params, "check-end")
	if err != nil {
		return err
	}
	slabs, err := e.ListSlabs(ctx)
	errs := []error{err}
	for _, slab := range slabs {
		errs = append(errs, e.DetachSlab(ctx, slab.ID), e.DeleteSlab(ctx, slab.ID))
	}
	tags, err := e.ListTags(ctx, "")
	errs = append(errs, err)
	for _, tag := range tags {
		errs = append(errs, e.DeleteTag(ctx, tag.Name))
	}
	return errors.Join(append(errs, e.Close())...)
}

// open opens a domain as another process would that is called client; about is what the engine is.
func (s *subject) open(ctx context.Context, params map[string]string, client string) (e engine.Engine, about string, err error) {
	if s.Socket == "" {
		e, err = engines.Registry(host.Exec{}).Open(ctx, domain.Entry{Name: "check", Engine: s.Engine, Params: params})
		return e, s.Engine, err
	}
	secrets, err := s.secrets()
	if err != nil {
		return nil, "", err
	}
	r, err := remote.OpenSocket(ctx, s.Socket, remote.Config{Client: client, Engine: s.Engine, Params: params, Secrets: secrets, Watch: remote.Silence})
	if err != nil {
		return nil, "", err
	}
	return r, r.About(), nil
}

func (s *subject) secrets() (domain.Secrets, error) {
	if s.SecretsFile == "" {
		return nil, nil
	}
	secrets, err := domain.ReadSecrets(s.SecretsFile)
	if err != nil {
		return nil, fault.New(fault.Invalid, "--secrets-file: %w", err)
	}
	return secrets, nil
}
