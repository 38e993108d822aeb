package smb

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engines/share"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// volume is the share as the kernel mounts it.
type volume struct {
	settings
	local *host.Local
}

// maxData is how much of a mount's options the kernel reads: one page, with its end.
const maxData = 4096

// mount implements share.Storage.
func (v *volume) mount(ctx context.Context, folder, target string, options []string) error {
	address, _, err := v.reach(ctx)
	if err != nil {
		return err
	}
	data := v.data(address, options)
	if n := len(strings.Join(data, ",")); n >= maxData {
		return fault.New(fault.Invalid, "the options of %s have %d bytes: the kernel takes %d", v.source(folder), n, maxData-1)
	}
	if err := v.local.MountFilesystem(ctx, v.source(folder), target, "cifs", data); err != nil {
		return v.refused(folder, err)
	}
	if err := v.inspect(target); err != nil {
		return errors.Join(err, v.local.Unmount(ctx, target))
	}
	return nil
}

// reach finds an address at which the server answers, and what version it speaks there.
func (v *volume) reach(ctx context.Context) (netip.AddrPort, dialect, error) {
	addresses, err := share.Resolve(ctx, v.host)
	if err != nil {
		return netip.AddrPort{}, 0, err
	}
	offer := dialects()
	if v.dialect != 0 {
		offer = []dialect{v.dialect}
	}
	why := error(fault.New(fault.Unavailable, "server %q has no address", v.host))
	for _, a := range addresses {
		at := netip.AddrPortFrom(a, v.port)
		spoken, err := negotiate(ctx, at, offer)
		if err == nil {
			return at, spoken, nil
		}
		why = fault.New(fault.KindOf(err), "server %q: %w", v.host, err)
	}
	return netip.AddrPort{}, 0, why
}

// source is the share's folder as the kernel's mount table names it.
func (v *volume) source(folder string) string {
	s := "//" + v.host + "/" + v.share
	if folder != "" {
		s += "/" + folder
	}
	return s
}

// data are the options of a mount; options are a class's, nil for the domain's own mount. The
// password is in them: they go to the kernel and nowhere else.
func (v *volume) data(server netip.AddrPort, options []string) []string {
	out := []string{
		"ip=" + server.Addr().String(),
		"port=" + strconv.Itoa(int(server.Port())),
		"username=" + escape(v.user),
		"password=" + escape(string(*v.pass)),
		"sec=ntlmssp",
		"hard",       // wait for a server that is away; an error would be lost data
		"serverino",  // two names of one file are one file
		"mfsymlinks", // links in directory volumes, which SMB has no portable way for
		"nounix",     // the POSIX extensions would change what everything below means
		// A server that died without a word, and came up elsewhere under its address, is noticed
		// after three of these; 60 seconds are the kernel's choice.
		"echo_interval=15",
		"nosuid", "nodev",
	}
	if v.domain != "" {
		out = append(out, "domain="+escape(v.domain))
	}
	if v.dialect != 0 {
		out = append(out, "vers="+v.dialect.String())
	}
	out = append(out, v.options...)
	if options == nil {
		return append(out, v.own()...)
	}
	// What users of a directory volume see, unless the class says otherwise. Files are cached under
	// the server's leases, and attributes for the kernel's usual second.
	out = append(out, "uid=0", "gid=0", "forceuid", "forcegid", "file_mode=0755", "dir_mode=0755", "cache=strict")
	return append(out, options...)
}

// own are the options of the domain's own mount, which other hosts have mounted as well.
func (v *volume) own() []string {
	return []string{
		"uid=" + strconv.Itoa(os.Geteuid()), "gid=" + strconv.Itoa(os.Getegid()), "forceuid", "forcegid",
		"file_mode=0600", "dir_mode=0700", "noexec",
		// Without a lease (below) there is nothing to cache by: reads and writes go to the server. In this mode they
		// do so whole; with "none" a loop device's would be a request for each stretch of memory, often a page.
		"cache=strict",
		// Names and sizes are the server's at every look, also those of the share's root.
		"actimeo=0", "nohandlecache",
		// No leases: under them the kernel keeps closed files open for a second, serves from its memory, and
		// refuses a loop device's direct I/O.
		"nolease",
		// flock stays on this host. At the server it would be a mandatory lock of all of the file:
		// a slab that grows while it is in use would fail its user's reads and writes.
		"nobrl",
	}
}

// escape doubles the commas, which separate options.
func escape(value string) string { return strings.ReplaceAll(value, ",", ",,") }

// errRefused marks that the server did not let the user in.
var errRefused = errors.New("access denied")

// refused says what a failed mount of a folder means.
func (v *volume) refused(folder string, err error) error {
	at := v.source(folder)
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fault.New(fault.Permission, "%s: the server refuses user %q: the password (or domain) is wrong, or that user may not use the share: %w", at, v.user, errRefused)
	case errors.Is(err, unix.EKEYEXPIRED), errors.Is(err, unix.EKEYREVOKED), errors.Is(err, unix.EKEYREJECTED):
		return fault.New(fault.Permission, "%s: the password of user %q has expired, or the account is locked: %w", at, v.user, err)
	case errors.Is(err, unix.ENOENT) && folder != "":
		return fault.New(fault.NotFound, "%s: the server has no such share, or the share no such folder: %w", at, err)
	case errors.Is(err, unix.ENOENT):
		return fault.New(fault.Invalid, "%s: the server has no such share: %w", at, err)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fault.New(fault.Invalid, "%s: the server does not have what the options ask for, such as encryption (seal): %w", at, err)
	case errors.Is(err, fault.Unsupported):
		return fault.New(fault.Unsupported, "%s: the kernel has no SMB client (module cifs): %w", at, err)
	}
	return err
}

// inspect looks at what was mounted: the kernel changes some of it by itself.
func (v *volume) inspect(target string) error {
	at, err := v.local.MountsAt(target)
	if err != nil {
		return err
	}
	if len(at) == 0 {
		return fault.New(fault.Unavailable, "%s is not mounted any more", target)
	}
	m := at[len(at)-1]
	// It is dropped at a server whose numbers are not unique.
	if !slices.Contains(m.Super, "serverino") {
		return fault.New(fault.Invalid, "%s: the server gives no inode numbers that are unique in the share: two names of one file would look like two files", m.Source)
	}
	if !slices.Contains(m.Super, "hard") {
		return fault.New(fault.Invalid, "%s is mounted \"soft\", by another mount of the same share on this node: data could be lost; unmount that one", m.Source)
	}
	if v.asGuest() {
		return fault.New(fault.Permission, "%s: the server took user %q for a guest instead of asking for the password: let it refuse guests (Samba: map to guest = never)", m.Source, v.user)
	}
	return nil
}
