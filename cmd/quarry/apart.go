package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/domain"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/remote"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// storages open domains: in this process, in one of their own, or behind a socket.
type storages struct {
	registry domain.Registry
	node     string
	watch    time.Duration
	local    *host.Local
	// started is told of every process of an engine that was started for a domain; may be nil.
	started func(domain string)
}

// open opens the storage of an entry.
func (s storages) open(ctx context.Context, e domain.Entry) (engine.Engine, error) {
	var opened engine.Engine
	var err error
	switch {
	case e.Socket != "":
		opened, err = s.behindSocket(ctx, e)
	case e.Process:
		opened, err = s.inProcess(ctx, e)
	default:
		return s.registry.Open(ctx, e)
	}
	if err != nil {
		return nil, fault.In(err, "open", e.Name, "")
	}
	return opened, nil
}

// statLimit is how long it may take to find out whose a directory is.
const statLimit = 10 * time.Second

// apart is an engine in another process.
type apart struct {
	*remote.Engine
	where string // for people
	stop  func()
}

// Describe implements engine.Engine.
func (a *apart) Describe(ctx context.Context) (engine.Description, error) {
	d, err := a.Engine.Describe(ctx)
	d.Notes = append(d.Notes, fmt.Sprintf("engine %s, %s", a.About(), a.where))
	return d, err
}

// Close implements engine.Engine.
func (a *apart) Close() error {
	err := a.Engine.Close()
	a.stop()
	return err
}

func (s storages) config(e domain.Entry) remote.Config {
	c := remote.Config{Client: "quarry/" + s.node + "/" + e.Name, Params: e.Params, Secrets: e.Secrets, Watch: s.watch}
	if e.Engine != domain.SocketEngine {
		c.Engine = e.Engine
	}
	return c
}

// behindSocket opens a domain in somebody else's process.
func (s storages) behindSocket(ctx context.Context, e domain.Entry) (engine.Engine, error) {
	r, err := remote.OpenSocket(ctx, e.Socket, s.config(e))
	if err != nil {
		return nil, err
	}
	return &apart{r, "at socket " + e.Socket, func() {}}, nil
}

// inProcess starts a process for a domain.
func (s storages) inProcess(ctx context.Context, e domain.Entry) (engine.Engine, error) {
	if err := s.registry.CheckParams(e.Engine, e.Params); err != nil {
		return nil, err
	}
	f := s.registry[e.Engine]
	p := &engineProcess{log: klog.FromContext(ctx).WithValues("domain", e.Name, "engine", e.Engine),
		config: host.ChildConfig{Name: "/proc/self/exe", Args: []string{"engine", e.Engine, "--inherited"}, Capabilities: f.Needs}}
	if dir := e.Params[f.Directory]; dir != "" && f.Needs != nil {
		var st syscall.Stat_t
		err := s.local.Within(ctx, "look at "+dir, statLimit, func() error { // the directory of a share may hang
			var now syscall.Stat_t
			err := syscall.Stat(dir, &now)
			if err == nil && now.Mode&syscall.S_IFMT != syscall.S_IFDIR {
				err = syscall.ENOTDIR
			}
			if err == nil {
				st = now
			}
			return err
		})
		if err != nil { // the engine has better words for it
			return nil, s.wrong(ctx, e, err)
		}
		p.config.Args = append(p.config.Args, "--writable", dir)
		// What it makes belongs to whom the directory belongs.
		if os.Geteuid() == 0 {
			p.config.UID, p.config.GID = st.Uid, st.Gid
		}
	}
	if s.started != nil {
		p.started = func() { s.started(e.Name) }
	}
	p.config.Said = func(line string) { p.log.Info("An engine's process says", "line", line) }
	cfg := s.config(e)
	cfg.Dial, cfg.Why = p.dial, p.why
	r, err := remote.Open(ctx, cfg)
	if err != nil {
		p.stop()
		return nil, err
	}
	return &apart{r, fmt.Sprintf("in a process of its own, as user %d", p.config.UID), p.stop}, nil
}

// wrong is what the engine itself says of a directory that is not there.
func (s storages) wrong(ctx context.Context, e domain.Entry, reason error) error {
	opened, err := s.registry[e.Engine].Open(ctx, e.Params, e.Secrets)
	if err == nil { // it came just now
		err = errors.Join(fault.New(fault.Unavailable, "%w", reason), opened.Close())
	}
	return err
}

// engineProcess is an engine's: each connection is to a new one. Whoever dials has lost the one
// before, which has ended, or hangs.
type engineProcess struct {
	config  host.ChildConfig
	log     klog.Logger
	started func() // may be nil

	mu      sync.Mutex
	child   *host.Child
	stopped bool
}

// endPatience is how long it may take to find out that a process has ended whose connection is gone.
const endPatience = 200 * time.Millisecond

// exitPatience is how long a process may take to end after its connection was closed.
const exitPatience = 5 * time.Second

func (p *engineProcess) dial(context.Context) (net.Conn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return nil, fault.New(fault.Unavailable, "the domain was closed")
	}
	if p.child != nil {
		how := p.child.Ended()
		if how == "" {
			how = "killed, because it did not answer"
		}
		if !p.child.Kill(0) {
			how = "it hangs in the kernel, and is left behind"
		}
		p.log.Info("An engine's process is started again", "pid", p.child.PID(), "ended", how)
	}
	child, conn, err := host.StartChild(p.config)
	if err != nil {
		return nil, err
	}
	p.child = child
	if p.started != nil {
		p.started()
	}
	p.log.Info("An engine's process has started", "pid", child.PID(), "user", p.config.UID)
	return conn, nil
}

// why says what is known of a process that does not answer.
func (p *engineProcess) why() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.child == nil {
		return ""
	}
	if !p.child.Wait(endPatience) {
		return ""
	}
	return "the engine's process ended with " + p.child.Ended()
}

// stop ends it for good. Its connection was closed.
func (p *engineProcess) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopped = true
	if p.child != nil && !p.child.Kill(exitPatience) {
		p.log.Info("An engine's process hangs in the kernel, and is left behind", "pid", p.child.PID())
	}
}
