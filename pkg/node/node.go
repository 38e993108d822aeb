// Package node is the agent's work on one node: it makes images usable and
// takes them down again, measures, grows, freezes and examines them. It knows
// neither gRPC nor CSI; package csi translates.
//
// There are no state files. What is staged is found again from the kernel: the
// loop device of an image carries its mark, mountinfo says where the device is
// mounted, and a directory's bind mount lies on an anchor, an empty tmpfs whose
// source names the image. So every operation may be repeated, and may be killed
// anywhere.
package node

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/block"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
)

// Manager is what a node asks of the Image Manager; *image.Manager has it.
type Manager interface {
	Stage(ctx context.Context, h image.Handle, node string, generation int64) (image.Staging, error)
	Formatted(ctx context.Context, h image.Handle, node, filesystem string) error
	Built(ctx context.Context, h image.Handle, node string, told int64) error
	Outline(ctx context.Context, h image.Handle, node string) (image.Outline, error)
	Unstaged(ctx context.Context, h image.Handle, node string, told int64) error
}

// Config of a Node.
type Config struct {
	NodeID  string
	Manager Manager
	// Engines finds the engine of an open domain, and who uses its slabs here.
	Engines func(domain string) (*engine.Users, error)
	// Domains are those that may be open; nil: none is known.
	Domains interface{ KnownDomains() []image.DomainInfo }
	// Host is where the work is done; nil: this host.
	Host *host.Local
	// KubeletDir, if not empty, is the folder in which all staging and target
	// paths must lie ("/var/lib/kubelet").
	KubeletDir string
}

// Node does the work of one node's agent. Its methods may be called by many
// goroutines; calls for one image wait for each other, others do not.
type Node struct {
	cfg     Config
	host    *host.Local
	devices block.Devices

	mu     sync.Mutex
	busy   map[image.Handle]chan struct{} // held locks; closed when let go
	frozen map[image.Handle]*host.Freeze
	slabs  map[image.Handle][]image.SlabRef // what this process attached; a hint only
	looks  map[string]*look                 // at slabs that no image uses; see take
	// reading are the private devices of copies, by path; reads counts them.
	reading map[string]*reading
	reads   int
	epochs  map[string]int64 // domain: the highest that a manager has told
	holds   map[string]*hold // switches half-way
	guard   *guard
	// holdLimit is how long one is held at most; tests do not wait so long.
	holdLimit time.Duration
}

var _ image.Agent = (*Node)(nil)

// New makes a Node. Call Start, then Guard, which goes on all the while, and Clean before serving.
func New(cfg Config) *Node {
	h := cfg.Host
	if h == nil {
		h = host.NewLocal(host.Exec{})
	}
	n := &Node{
		cfg: cfg, host: h, devices: block.Devices{Host: h},
		busy:   map[image.Handle]chan struct{}{},
		frozen: map[image.Handle]*host.Freeze{},
		looks:  map[string]*look{},
		slabs:  map[image.Handle][]image.SlabRef{}, reading: map[string]*reading{}, epochs: map[string]int64{}, holds: map[string]*hold{}, holdLimit: block.SuspendLimit,
	}
	n.guard = newGuard(&n.devices, n.storageUsage)
	return n
}

// Start resumes what a predecessor that died left suspended. It waits for no storage: what goes on
// may have to be paused at once, by Guard.
func (n *Node) Start(ctx context.Context) {
	log := klog.FromContext(ctx)
	resumed, err := n.devices.Resume(ctx)
	if err != nil {
		log.Error(err, "Looking for suspended devices")
	}
	for _, path := range resumed {
		log.Info("Resumed a device that was left suspended", "device", path)
	}
}

// Clean thaws what a predecessor that died left frozen, and takes down the devices that it had
// made for itself and what no other uses. Nothing may be served before: a new staging would find
// layers' devices that know an older store, and a new freeze would be thawed. Errors of
// single ones are logged, and none waits for another: one dead server must not keep an agent
// from starting.
func (n *Node) Clean(ctx context.Context) error {
	log := klog.FromContext(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	all.Go(func() {
		if err := n.devices.CollectAll(ctx); err != nil {
			log.Error(err, "Taking down what a predecessor left")
		}
	})
	devices, err := n.devices.All(ctx)
	if errors.Is(err, fault.Unavailable) {
		log.Error(err, "Looking for frozen filesystems")
		return nil
	}
	if err != nil {
		return err
	}
	mounts, err := n.host.Mounts()
	if err != nil {
		return err
	}
	for _, d := range devices {
		all.Go(func() {
			n.dropPrivate(ctx, d)
			n.thawLeft(ctx, d, mounts)
		})
	}
	return nil
}

func (n *Node) thawLeft(ctx context.Context, d block.Device, mounts []host.Mount) {
	log := klog.FromContext(ctx)
	for _, m := range mounts {
		if m.Source != d.Path || m.Root != "/" || !n.mine(m.Point) {
			continue
		}
		thawed, err := n.host.ThawLeft(ctx, m.Point)
		if err != nil {
			log.Error(err, "Thawing what may have been left frozen", "mount", m.Point)
		} else if thawed {
			log.Info("Thawed a filesystem that was left frozen", "mount", m.Point, "device", d.Path)
		}
		return // one mount stands for the filesystem
	}
}

// mine says whether a mount point is one that this agent looks after: another
// agent, for another kubelet's folder, may have frozen its own.
func (n *Node) mine(point string) bool {
	if n.cfg.KubeletDir == "" {
		return true
	}
	dir, err := filepath.EvalSymlinks(n.cfg.KubeletDir)
	return err == nil && strings.HasPrefix(point, dir+"/")
}

// Abandoned is how many system calls hang on storage that does not answer.
func (n *Node) Abandoned() int { return n.host.Abandoned() }

// lock waits until no other operation of this image runs. fault.Pending: one
// still ran when ctx ended.
func (n *Node) lock(ctx context.Context, h image.Handle) (unlock func(), err error) {
	for {
		unlock, held := n.tryLock(h)
		if unlock != nil {
			return unlock, nil
		}
		select {
		case <-held:
		case <-ctx.Done():
			return nil, fault.New(fault.Pending, "another operation on %s is still running on node %s", h, n.cfg.NodeID)
		}
	}
}

// tryLock returns a nil unlock and the other's lock when one is held.
func (n *Node) tryLock(h image.Handle) (unlock func(), held chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if held, ok := n.busy[h]; ok {
		return nil, held
	}
	mine := make(chan struct{})
	n.busy[h] = mine
	return func() {
		n.mu.Lock()
		delete(n.busy, h)
		n.mu.Unlock()
		close(mine)
	}, nil
}

// Agents is image.Agents for an installation of one node.
type Agents struct {
	mu   sync.Mutex
	node *Node
}

// Set names the node. The Image Manager is made before the Node that asks it.
func (a *Agents) Set(n *Node) {
	a.mu.Lock()
	a.node = n
	a.mu.Unlock()
}

// Agent implements image.Agents.
func (a *Agents) Agent(node string) (image.Agent, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.node == nil || a.node.cfg.NodeID != node {
		return nil, fault.New(fault.Unavailable, "node %q has no agent here", node)
	}
	return a.node, nil
}

// Nodes implements image.Agents.
func (a *Agents) Nodes() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.node == nil {
		return nil
	}
	return []string{a.node.cfg.NodeID}
}

// Freeze implements image.Agent. It does not wait for another operation on the
// image: that may itself be waiting for the Image Manager. fault.Pending then.
func (n *Node) Freeze(ctx context.Context, h image.Handle, limit time.Duration) (image.Frozen, error) {
	unlock, held := n.tryLock(h)
	if held != nil {
		return "", fault.New(fault.Pending, "freeze %s: another operation on it is running on node %s", h, n.cfg.NodeID)
	}
	defer unlock()
	n.mu.Lock()
	old := n.frozen[h]
	n.mu.Unlock()
	if old != nil {
		if old.Holds() {
			return image.IsFrozen, nil
		}
		// Its Thaw never came. Whoever waits for it gets a Conflict.
		_ = old.Thaw()
		n.forgetFreeze(h)
	}
	s, err := n.find(ctx, h)
	if err != nil {
		return "", fault.In(err, "freeze", h.Domain, h.Image)
	}
	switch {
	case s.anchor != nil || s.raw():
		return image.NotFreezable, nil
	case len(s.mounts) == 0:
		return image.NotStaged, nil
	}
	if err := s.wait(); err != nil {
		return "", fault.In(err, "freeze", h.Domain, h.Image)
	}
	point, err := n.visible(s)
	if err != nil {
		return "", fault.In(err, "freeze", h.Domain, h.Image)
	}
	f, err := n.host.Freeze(ctx, point, limit)
	if errors.Is(err, fault.Unsupported) {
		return image.NotFreezable, nil
	}
	if err != nil {
		return "", fault.In(err, "freeze", h.Domain, h.Image)
	}
	n.mu.Lock()
	n.frozen[h] = f
	n.mu.Unlock()
	return image.IsFrozen, nil
}

// visible is a mount point of the image that nothing else covers.
func (n *Node) visible(s state) (point string, err error) {
	for _, m := range s.mounts {
		at, err := n.host.MountsAt(m.Point)
		if err != nil {
			return "", err
		}
		if len(at) > 0 && at[len(at)-1].ID == m.ID {
			return m.Point, nil
		}
	}
	return "", fault.New(fault.Unavailable, "another mount covers %s: unmount that", s.mounts[0].Point)
}

// Thaw implements image.Agent. It waits for no other operation.
func (n *Node) Thaw(_ context.Context, h image.Handle) error {
	f := n.forgetFreeze(h)
	if f == nil {
		return fault.In(fault.New(fault.Conflict, "it is not frozen: its time was up, it was unstaged, or the agent was restarted"), "thaw", h.Domain, h.Image)
	}
	return fault.In(f.Thaw(), "thaw", h.Domain, h.Image)
}

func (n *Node) forgetFreeze(h image.Handle) *host.Freeze {
	n.mu.Lock()
	defer n.mu.Unlock()
	f := n.frozen[h]
	delete(n.frozen, h)
	return f
}

// Staged implements image.Agent. As Freeze it waits for no other operation: a
// staging that has the manager's answer shows nothing in the kernel yet.
// fault.Pending then.
func (n *Node) Staged(ctx context.Context, h image.Handle) (bool, error) {
	unlock, held := n.tryLock(h)
	if held != nil {
		return false, fault.New(fault.Pending, "look for %s: another operation on it is running on node %s", h, n.cfg.NodeID)
	}
	defer unlock()
	s, err := n.find(ctx, h)
	if err != nil {
		return false, fault.In(err, "look for", h.Domain, h.Image)
	}
	return s.anchor != nil || len(s.devices) > 0, nil
}
