package nfs

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// mountLimit is how long a mount may take of a server that has just answered.
const mountLimit = 30 * time.Second

// MountOptions are those of every mount of the export from a server's address: the domain's, and those of a class in
// the place of the domain's of the same name.
func (x Export) MountOptions(server netip.Addr, class []string) []string {
	tcp := "tcp"
	if server.Is6() {
		tcp = "tcp6"
	}
	options := []string{"proto=" + tcp, "addr=" + server.String(), "hard"}
	all := slices.Concat(x.Options, class)
	if !has(all, "port") {
		options = append(options, "port="+strconv.Itoa(DefaultPort)) // else the kernel asks rpcbind
	}
	for _, o := range x.Options {
		// Of most options the kernel takes the last one, but it collects those of sec.
		if name, _, _ := strings.Cut(o, "="); !has(class, name) {
			options = append(options, o)
		}
	}
	return append(options, class...)
}

// has says whether an option is among others, by its name.
func has(options []string, name string) bool {
	return slices.ContainsFunc(options, func(o string) bool { n, _, _ := strings.Cut(o, "="); return n == name })
}

// Mount mounts a folder of the export on target, by the mount system call, and says in words what a refusal means. With
// fault.Unsupported the server has not that version.
func (x Export) Mount(ctx context.Context, h *host.Local, folder, target string, options []string) error {
	source := x.Source(folder)
	limit, cancel := context.WithTimeout(ctx, mountLimit)
	defer cancel()
	err := h.MountFilesystem(limit, source, target, "nfs", options)
	if err != nil && ctx.Err() == nil && limit.Err() != nil {
		return fault.New(fault.Unavailable, "mount %s: no answer within %s: the server does not answer", source, mountLimit)
	}
	return explain(err, source)
}

// explain gives the kernel's answer its meaning. It knows what the server said by its number only.
func explain(err error, source string) error {
	var kind fault.Kind
	var meaning string
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOENT):
		kind, meaning = fault.NotFound, "the server has no such export, or no such directory in it (showmount -e shows a server's exports; NFS 4 names them as seen from the export with fsid=0, if there is one)"
	case errors.Is(err, unix.ENOTDIR):
		kind, meaning = fault.Invalid, "what the server has there is not a directory"
	case errors.Is(err, unix.EACCES):
		kind, meaning = fault.Permission, "the server refuses it: the path is not exported, or not to this host (its exports(5) has to name this host)"
	case errors.Is(err, unix.EPERM):
		kind, meaning = fault.Permission, "the server refuses this host, or wants another sec= of its clients; or this process may not mount (CAP_SYS_ADMIN)"
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EPFNOSUPPORT), errors.Is(err, unix.EPROTOTYPE):
		kind, meaning = fault.Unsupported, "the server does not have this version of NFS (or of MOUNT) over TCP"
	case errors.Is(err, unix.ECONNREFUSED):
		kind, meaning = fault.Unavailable, "the server refuses the connection: is its NFS service running, and for NFS 3 rpcbind and mountd too?"
	case errors.Is(err, unix.ETIMEDOUT), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTDOWN), errors.Is(err, unix.EIO):
		kind, meaning = fault.Unavailable, "the server does not answer"
	case errors.Is(err, unix.ESTALE):
		kind, meaning = fault.Unavailable, "the server does not know the directory any more that it has just named: its exports have changed, or its file system is not mounted"
	case errors.Is(err, unix.ENAMETOOLONG):
		kind, meaning = fault.Invalid, "the path is too long for the server"
	case errors.Is(err, unix.ENOKEY), errors.Is(err, unix.EKEYEXPIRED), errors.Is(err, unix.EKEYREJECTED):
		kind, meaning = fault.Permission, "there is no Kerberos ticket for it: rpc.gssd and a keytab are needed on this node"
	default:
		return err
	}
	return fault.New(kind, "mount %s: %s: %v", source, meaning, errno(err)) // the number means something else to who opens what is mounted
}

// Unopened says what it means that a mounted export cannot be opened as a domain, where the server's own reason is known.
func (x Export) Unopened(err error) error {
	switch {
	case errors.Is(err, unix.EROFS):
		return fault.New(fault.Permission, "the server exports %s read-only to this host: its exports(5) has to say rw: %w", x.Source(x.Folder), err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fault.New(fault.Permission, "the server does not let root write in %s: its exports(5) has to say no_root_squash, and its directory must be root's: %w", x.Source(x.Folder), err)
	}
	return err
}

// errno is the number in a failure: what was said around it is said better.
func errno(err error) error {
	var n unix.Errno
	if errors.As(err, &n) {
		return n
	}
	return err
}
