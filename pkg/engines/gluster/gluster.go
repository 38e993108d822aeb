// Package gluster is the engine for a folder of a Gluster volume. It mounts the volume itself, with Gluster's FUSE
// client, as package share has it, and knows what is Gluster's own: whom to ask for the bricks, what of its
// caches, its syncing and its distribution of files cannot be relied on, and what a client is told of bricks that are
// away and copies that differ.
package gluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/posix"
	"github.com/quarry-csi/quarry/pkg/engines/share"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/gluster"
)

// Params are the parameters of a domain of this type, with one line of help each.
func Params() map[string]string {
	return map[string]string{
		"servers": "names or addresses of servers that know the volume, separated by commas; whichever answers tells the bricks (required)",
		"volume":  "the volume's name (required)",
		"folder":  "folder of the volume that belongs to Quarry alone; made if it is missing (default: all of the volume)",
		"options": "mount options of mount.glusterfs, separated by commas: " + strings.Join(slices.Sorted(maps.Keys(allowedOptions())), ", "),
	}
}

// Place is the folder that is the domain, in words that are the same for two entries of the same one, as far as that can
// be seen: the servers may have other names.
func Place(params map[string]string) string {
	v, err := parse(params)
	if err != nil {
		return ""
	}
	return fmt.Sprintf("gluster://%s/%s/%s", strings.ToLower(slices.Min(v.servers)), v.name, v.folder)
}

// allowedOptions change how a client works, not what it promises.
func allowedOptions() map[string]string {
	return map[string]string{
		"acl": "", "selinux": "", "resolve-gids": "", "enable-ino32": "",
		"attribute-timeout": `[0-9]+(\.[0-9]+)?`, "entry-timeout": `[0-9]+(\.[0-9]+)?`, "negative-timeout": `[0-9]+(\.[0-9]+)?`,
		"gid-timeout": "[0-9]+", "lru-limit": "[0-9]+", "background-qlen": "[0-9]+", "congestion-threshold": "[0-9]+",
		"reader-thread-count": "[0-9]+", "oom-score-adj": "-?[0-9]+", "use-readdirp": "yes|no", "direct-io-mode": "enable|disable|auto",
	}
}

// refusedOptions are those of mount.glusterfs that somebody may well ask for.
func refusedOptions() map[string]string {
	const own = "Quarry chooses it"
	return map[string]string{
		"kernel-writeback-cache": "the kernel would keep what was written from other nodes, and lose it with this one",
		"auto-invalidation":      "this node would go on to see what others have replaced",
		"fopen-keep-cache":       "this node would go on to see what others have replaced",
		"backup-volfile-servers": `name all servers in the parameter "servers"`,
		"backupvolfile-server":   `name all servers in the parameter "servers"`,
		"xlator-option":          "it can turn off what keeps copies the same; set options of the volume with \"gluster volume set\"",
		"worm":                   "nothing could be changed", "ro": `use readOnly of the volume`,
		"log-file": own, "log-level": own, "volume-id": own, "subdir-mount": own, "fuse-mountopts": own, "process-name": own,
		"transport": "only TCP is known",
	}
}

// Open opens the folder of a volume as a domain; the client is started with run. mounts is the folder for this
// process's mounts, "" the usual one.
//
// fault.Invalid: a parameter is unknown, missing or wrong, or the servers have no such volume.
// fault.Permission: the volume does not let this host in. fault.Unavailable: no server, or no brick, can be reached now.
func Open(ctx context.Context, params map[string]string, run host.Runner, local *host.Local, mounts string) (engine.Engine, error) {
	v, err := parse(params)
	if err != nil {
		return nil, err
	}
	v.client = gluster.New(run, local)
	e := &Engine{volume: v}
	e.Engine, err = share.Open(ctx, local, mounts, share.Storage{
		Type:         "gluster",
		Location:     v.String(),
		Folder:       v.folder,
		Mount:        v.mount,
		CheckOptions: checkOptions,
		Ping:         func(ctx context.Context) error { _, err := v.answering(ctx); return err },
		Ready:        v.ready,
		Health:       v.health,
		TreesApart:   true,
		Posix:        posix.Options{NoDirSync: true},
	})
	if err != nil {
		return nil, err
	}
	return e, nil
}

// Engine is an opened domain.
type Engine struct {
	*share.Engine
	volume *volume
}

// Describe implements engine.Engine.
func (e *Engine) Describe(ctx context.Context) (engine.Description, error) {
	d, err := e.Engine.Describe(ctx)
	e.volume.mu.Lock()
	defer e.volume.mu.Unlock()
	d.Notes = append(d.Notes, e.volume.notes...)
	if bound := e.volume.daemon.Bound; bound != "" {
		d.Notes = append(d.Notes, "the processes that serve the mounts do not outlive this one: "+bound+"; volumes in use fail then, until their pods start anew")
	}
	return d, err
}

// volume is what a domain's parameters say, and what was found out.
type volume struct {
	servers      []string
	name, folder string
	options      []string
	client       *gluster.Client

	mu     sync.Mutex
	at     string         // the domain's own mount
	groups int            // of bricks, when they were last looked at
	daemon gluster.Daemon // that serves it
	notes  []string
}

func (v *volume) String() string {
	return fmt.Sprintf("%s:/%s (Gluster)", strings.Join(v.servers, ","), path.Join(v.name, v.folder))
}

func parse(params map[string]string) (*volume, error) {
	known := slices.Sorted(maps.Keys(Params()))
	for name := range params {
		if !slices.Contains(known, name) {
			return nil, fault.New(fault.Invalid, "parameter %q is unknown: engine gluster knows %s", name, strings.Join(known, ", "))
		}
	}
	v := &volume{name: params["volume"]}
	for s := range strings.SplitSeq(params["servers"], ",") {
		s = strings.TrimSpace(s)
		if _, err := netip.ParseAddr(s); err != nil && !regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$`).MatchString(s) {
			return nil, fault.New(fault.Invalid, "parameter \"servers\" is %q: names or addresses are needed, separated by commas, such as \"gluster1,gluster2\"; %q is none", params["servers"], s)
		}
		v.servers = append(v.servers, s)
	}
	// What "gluster volume create" takes.
	if !regexp.MustCompile(`^[A-Za-z0-9_-]{1,255}$`).MatchString(v.name) || strings.HasPrefix(v.name, "-") {
		return nil, fault.New(fault.Invalid, "parameter \"volume\" is %q: the name of a Gluster volume is needed: letters, digits, \"_\" and \"-\"", v.name)
	}
	var err error
	if v.folder, err = share.Folder(params["folder"]); err != nil {
		return nil, err
	}
	for o := range strings.SplitSeq(params["options"], ",") {
		if o = strings.TrimSpace(o); o != "" {
			v.options = append(v.options, o)
		}
	}
	if err := checkOptions(v.options); err != nil {
		return nil, fmt.Errorf("parameter \"options\": %w", err)
	}
	for _, o := range v.options {
		if strings.Contains(o, "-timeout=") && !strings.HasPrefix(o, "gid-") {
			return nil, fault.New(fault.Invalid, "parameter \"options\": mount option %q is for a class: the domain's own mount has to show at once what other nodes do", o)
		}
	}
	return v, nil
}

func checkOptions(options []string) error {
	return share.Allow(options, allowedOptions(), refusedOptions())
}

// answering puts the servers first that answer. fault.Unavailable: none does.
func (v *volume) answering(ctx context.Context) ([]string, error) {
	errs := make([]error, len(v.servers))
	var wait sync.WaitGroup
	for i, s := range v.servers {
		wait.Go(func() {
			addresses, err := share.Resolve(ctx, s)
			var ports []netip.AddrPort
			for _, a := range addresses {
				ports = append(ports, netip.AddrPortFrom(a, gluster.Port))
			}
			if err == nil {
				_, err = share.Ping(ctx, ports...)
			}
			errs[i] = err
		})
	}
	wait.Wait()
	var yes, no []string
	for i, s := range v.servers {
		if errs[i] == nil {
			yes = append(yes, s)
		} else {
			no = append(no, s)
		}
	}
	if len(yes) == 0 {
		return nil, fault.New(fault.Unavailable, "none of the servers of volume %q answers on port %d: %w", v.name, gluster.Port, errors.Join(errs...))
	}
	return append(yes, no...), nil
}

// mount is share.Storage.Mount.
func (v *volume) mount(ctx context.Context, folder, target string, options []string) error {
	own := folder == v.folder && options == nil // of the domain
	if own {
		if err := v.returns(); err != nil {
			return err
		}
	}
	servers, err := v.answering(ctx)
	if err != nil {
		return err
	}
	// What users do in their trees is between them and Gluster; who looks at slabs and tags has to see them as they are.
	tree := strings.HasPrefix(folder, path.Join(v.folder, "slabs")+"/")
	d, err := v.client.Mount(ctx, gluster.Mount{Servers: servers, Volume: v.name, Folder: folder, Target: target, Coherent: !tree, Options: slices.Concat(v.options, options)})
	if err != nil || !own {
		return err
	}
	notes, err := v.examine(ctx, target)
	if err != nil {
		return errors.Join(err, v.client.Unmount(target))
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.at, v.daemon, v.notes = target, d, notes
	return nil
}

// returns says with an error that the domain's mount fails only until bricks are back: the process that serves it is
// there, and tries to reach them every few seconds. Another one could do no more, and what is in use goes on
// in the first one.
func (v *volume) returns() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.at == "" || !v.daemon.Serves(v.at) {
		return nil
	}
	return fault.New(fault.Unavailable, "too few bricks of volume %q can be reached from this node; its client (process %d) goes on trying (\"gluster volume status %s\")", v.name, v.daemon.PID, v.name)
}

// look asks the domain's client about its bricks.
func (v *volume) look(ctx context.Context, at string) (gluster.State, error) {
	s, err := v.client.Look(ctx, at)
	if err == nil {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.groups = len(s.Groups)
	}
	return s, err
}

// ready is share.Storage.Ready: somebody may have added bricks since the domain was opened. Folders go on as they were until
// somebody spreads them over the new bricks, so the last look at the volume's health is soon enough.
func (v *volume) ready(context.Context) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.groups > 1 {
		return fault.Wrap(fault.Unavailable, v.spread(v.groups))
	}
	return nil
}

// spread refuses a distributed volume. Each file lies on one group there, and its group is found by its name. Two nodes
// that link two files to one name both succeed when the files lie on different groups, and when no brick of a group can be
// reached, its files are said not to exist.
func (v *volume) spread(groups int) error {
	return fmt.Errorf("volume %q is distributed over %d groups of bricks: there two nodes can make the same tag, and files on a group that is away are said not to exist: a volume of one group is needed, replicated or dispersed", v.name, groups)
}
