package domain

import (
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// SocketEngine stands for the type of an engine that only its process knows. It is also
// what a node is asked to open for an entry with a socket.
const SocketEngine = "socket"

// What an entry says beside its parameters goes to a node as parameters that no engine has.
const (
	reserved        = "quarry.dev/"
	reservedProcess = reserved + "process"
	reservedSocket  = reserved + "socket"
	reservedEngine  = reserved + "engine"
	reservedDomain  = reserved + "domain"
)

// maxSocket is what fits into a Linux sockaddr_un with its closing zero.
const maxSocket = 107

// readEngine reads who the engine is: engine, socket and process.
func readEngine(item place, fields map[string]place, reg Registry, e *Entry) (err error) {
	if p, ok := fields["socket"]; ok {
		if e.Socket, err = p.socket(); err != nil {
			return err
		}
	}
	if p, ok := fields["process"]; ok {
		if e.Process, err = p.boolean(); err != nil {
			return err
		}
		if e.Process && e.Socket != "" {
			return p.wrong("value true does not go with socket: a process is started by Quarry, or listens on a socket")
		}
	}
	if e.Socket == "" {
		if e.Engine, err = required(item, fields, "engine"); err != nil {
			return err
		}
		if err := reg.CheckParams(e.Engine, nil); err != nil {
			return fields["engine"].wrong("%w", err)
		}
		if e.Scope = reg[e.Engine].Scope; e.Scope == "" {
			e.Scope = ScopeShared
		}
		return nil
	}
	// Each node has a process of its own there. That all of these reach the same storage is for
	// the administrator to say.
	e.Engine, e.Scope = SocketEngine, ScopeNode
	if p, ok := fields["engine"]; ok {
		if e.Engine, err = p.text(); err != nil {
			return err
		}
		if e.Engine == "" {
			return p.wrong("value %q: must be the type that the process says it is, or be left out", e.Engine)
		}
	}
	return nil
}

func (p place) socket() (string, error) {
	path, err := p.text()
	if err != nil {
		return "", err
	}
	if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) {
		return "", p.wrong("value %q: must be the absolute path of a Unix socket, such as /run/example/engine.sock", path)
	}
	if path = filepath.Clean(path); len(path) > maxSocket {
		return "", p.wrong("value %q has %d bytes: the path of a socket may have %d", path, len(path), maxSocket)
	}
	return path, nil
}

// ForNode is what a node is asked to open for an entry: a type and parameters. FromNode is the
// reverse.
func (e Entry) ForNode() (engineType string, params map[string]string) {
	params = maps.Clone(e.Params)
	if params == nil {
		params = map[string]string{}
	}
	switch {
	case e.Socket != "":
		params[reservedSocket], params[reservedEngine], params[reservedDomain] = e.Socket, e.Engine, e.Name
		return SocketEngine, params
	case e.Process:
		params[reservedProcess], params[reservedDomain] = "true", e.Name
	}
	return e.Engine, params
}

// FromNode reads on a node what ForNode made, and checks the names of parameters. Only what opening
// needs is in the entry.
func (r Registry) FromNode(engineType string, params, secrets map[string]string) (Entry, error) {
	e := Entry{Name: params[reservedDomain], Engine: engineType, Socket: params[reservedSocket], Params: maps.Clone(params), Secrets: secrets}
	_, e.Process = params[reservedProcess]
	for _, name := range []string{reservedProcess, reservedSocket, reservedEngine, reservedDomain} {
		delete(e.Params, name)
	}
	if engineType == SocketEngine {
		if e.Engine = params[reservedEngine]; e.Socket == "" || e.Engine == "" {
			return Entry{}, fault.New(fault.Invalid, "a domain behind a socket needs the parameters %s and %s", reservedSocket, reservedEngine)
		}
		for name := range e.Params {
			if strings.HasPrefix(name, reserved) {
				return Entry{}, fault.New(fault.Unsupported, "parameter %q is unknown here: the controller is newer than this node's agent", name)
			}
		}
		return e, nil
	}
	return e, r.CheckParams(engineType, e.Params)
}

// OnNodes names what nodes can be asked to open: the types, and SocketEngine.
func (r Registry) OnNodes() []string {
	return slices.Sorted(slices.Values(append(r.Engines(), SocketEngine)))
}
