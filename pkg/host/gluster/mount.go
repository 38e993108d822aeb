// Package gluster mounts Gluster volumes with their FUSE client, the program glusterfs, and asks that
// client what it knows about the volume's bricks.
package gluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// Port on which a server's manager tells clients what bricks a volume has.
const Port = 24007

const (
	program = "glusterfs"
	fsType  = "fuse.glusterfs" // in mountinfo
	// mountLimit is long because one server after the other is asked.
	mountLimit = time.Minute
	// quick is how long an answer may take that needs no data to move.
	quick = 10 * time.Second
)

// Client mounts and asks on one host.
type Client struct {
	run   host.Runner
	local *host.Local
}

// New returns the client that starts programs with run.
func New(run host.Runner, local *host.Local) *Client { return &Client{run: run, local: local} }

// Mount says what to mount.
type Mount struct {
	// Servers that may tell the volume's bricks, by name or address: asked in this order.
	Servers []string
	Volume  string
	// Folder of the volume, slash-separated; "": its root.
	Folder string
	// Target is an empty directory.
	Target string
	// Coherent mounts show at once what other clients have done, at the price of asking the
	// bricks every time. Others may show it a second later.
	Coherent bool
	// Options are those of mount.glusterfs(8) that this program takes as "--name" or "--name=value".
	Options []string
}

// String renders what is mounted, for people.
func (m Mount) String() string {
	return fmt.Sprintf("%s:/%s", strings.Join(m.Servers, ","), strings.Trim(m.Volume+"/"+m.Folder, "/"))
}

// arguments of the program.
func (m Mount) arguments(log, pid string) []string {
	var args []string
	for _, s := range m.Servers {
		args = append(args, "--volfile-server="+s)
	}
	args = append(args, "--volfile-id="+m.Volume, "--process-name=fuse", "--log-level=WARNING", "--log-file="+log, "--pid-file="+pid)
	if m.Folder != "" {
		args = append(args, "--subdir-mount=/"+m.Folder)
	}
	if m.Coherent {
		args = append(args,
			// What the kernel remembers,
			"--attribute-timeout=0", "--entry-timeout=0", "--negative-timeout=0",
			// and what the client itself does, for a second unless told otherwise: sizes, names that are gone,
			// whole small files.
			"--xlator-option=*-md-cache.md-cache-timeout=0", "--xlator-option=*-quick-read.cache-timeout=0",
			// It also opens files only when they are read: by then another may have removed them.
			"--xlator-option=*-open-behind.lazy-open=no")
	}
	for _, o := range m.Options {
		args = append(args, "--"+o)
	}
	return append(args, m.Target)
}

// Daemon is the process that serves a mount. It ends by itself when nothing uses its mount any more.
type Daemon struct {
	PID int
	// Bound says what else it ends with, "" if with nothing: see host.Local.Outlive.
	Bound string
}

// Mount mounts. The process that serves it goes on when this one ends, as far as Daemon.Bound does not say
// otherwise, because workloads use what is mounted.
//
// fault.Invalid: the servers have no such volume. fault.NotFound: the volume has no such folder.
// fault.Permission: the volume does not let this host in. fault.Unavailable: no server answers, or no
// brick does. fault.Unsupported: the program is not installed.
func (c *Client) Mount(ctx context.Context, m Mount) (Daemon, error) {
	dir, err := os.MkdirTemp("", "quarry-gluster-")
	if err != nil {
		return Daemon{}, fault.New(fault.Unavailable, "a folder for the log of %s: %w", program, err)
	}
	defer func() { _ = os.RemoveAll(dir) }() // the daemon has its log open; see quiet
	log, pidFile := filepath.Join(dir, "log"), filepath.Join(dir, "pid")
	_, err = c.run.Run(ctx, host.Command{Name: program, Args: m.arguments(log, pidFile), Timeout: mountLimit})
	if err == nil {
		err = c.answers(ctx, m.Target)
	}
	if err == nil {
		c.quiet(ctx, m.Target)
		d := Daemon{PID: readPID(pidFile)}
		d.Bound = c.local.Outlive(d.PID)
		return d, nil
	}
	if errors.Is(err, fault.Unsupported) {
		return Daemon{}, err
	}
	err = explain(m, readLog(log), err)
	if d := (Daemon{PID: readPID(pidFile)}); d.Serves(m.Target) {
		_ = unix.Kill(d.PID, unix.SIGKILL)
	}
	_ = c.Unmount(m.Target) // mostly it has unmounted itself
	return Daemon{}, err
}

// answers waits until the mount works: the program has ended well before it knows.
func (c *Client) answers(ctx context.Context, target string) error {
	return c.local.Within(ctx, "stat "+target, mountLimit, func() error {
		var st unix.Statfs_t
		var stat unix.Stat_t
		if err := errors.Join(unix.Stat(target, &stat), unix.Statfs(target, &st)); err != nil {
			return err
		}
		if int64(st.Type) != unix.FUSE_SUPER_MAGIC {
			return errors.New("the client has ended") // and has unmounted itself
		}
		if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
			return unix.ENOTDIR
		}
		// A folder to be mounted that is a file passes for one until it is looked into.
		f, err := os.Open(target)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := f.Readdirnames(1); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, io.EOF) {
			return err
		}
		return nil
	})
}

// quiet lets the daemon log nothing more but what is critical: nobody would see how large the log grows
// while a server is away for weeks.
func (c *Client) quiet(ctx context.Context, target string) {
	const critical = "3"
	_ = c.local.Within(ctx, "quiet "+target, quick, func() error {
		return os.WriteFile(filepath.Join(target, ".meta/logging/loglevel"), []byte(critical), 0)
	})
}

// Unmount takes down what a client of Gluster has mounted at target: at once for those who look there, and when they are
// done for those who use it. Nothing is success.
func (c *Client) Unmount(target string) error {
	at, err := c.local.MountsAt(target)
	if err != nil || len(at) == 0 || at[len(at)-1].Type != fsType {
		return err
	}
	return unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
}

// Serves says whether the process is there, and serves target.
func (d Daemon) Serves(target string) bool {
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", d.PID))
	return d.PID != 0 && err == nil && strings.HasSuffix(string(cmdline), "\x00"+target+"\x00")
}

func readPID(file string) int {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0
	}
	return pid
}

// readLog reads what the program said, or "".
func readLog(file string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	return string(b)
}
