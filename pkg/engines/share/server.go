package share

import (
	"cmp"
	"context"
	"maps"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// pingLimit is how long a server may take to accept a connection.
const pingLimit = 5 * time.Second

// Resolve returns the addresses of a server, given as a name or an address: IPv4 first, since more
// servers listen there. The mount calls of the kernel resolve no names. fault.Unavailable: the name
// cannot be resolved now.
func Resolve(ctx context.Context, server string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(server); err == nil {
		return []netip.Addr{a.Unmap()}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, pingLimit)
	defer cancel()
	found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", server)
	if err != nil {
		// Also a name that is not there: a cluster's DNS says so of a service that is not there yet.
		return nil, fault.New(fault.Unavailable, "server %q: its name cannot be resolved: %w", server, err)
	}
	for i := range found {
		found[i] = found[i].Unmap()
	}
	slices.SortStableFunc(found, func(a, b netip.Addr) int { return cmp.Compare(a.BitLen(), b.BitLen()) })
	return found, nil
}

// Ping connects to the first of the addresses that answers, in order, and returns it; it is for
// Storage.Ping, and for choosing a server before it is mounted. fault.Unavailable: none answers.
func Ping(ctx context.Context, addresses ...netip.AddrPort) (netip.AddrPort, error) {
	var why error
	for _, a := range addresses {
		d := net.Dialer{Timeout: pingLimit}
		conn, err := d.DialContext(ctx, "tcp", a.String())
		if err == nil {
			_ = conn.Close() // nothing was sent
			return a, nil
		}
		why = err
	}
	if why == nil {
		return netip.AddrPort{}, fault.New(fault.Internal, "no address to connect to")
	}
	return netip.AddrPort{}, fault.New(fault.Unavailable, "the server does not answer: %w", why)
}

// Allow checks mount options against those that are allowed: by name, a regular expression (RE2)
// that the whole value has to match; an empty one is for an option without a value. refused has, by
// name, why an option is refused that somebody may well ask for. The error is fault.Invalid, and
// shows no value: it may be secret.
func Allow(options []string, allowed, refused map[string]string) error {
	for _, o := range options {
		name, value, has := strings.Cut(o, "=")
		if why, ok := refused[name]; ok {
			return fault.New(fault.Invalid, "mount option %q is refused: %s", name, why)
		}
		pattern, ok := allowed[name]
		if !ok {
			return fault.New(fault.Invalid, "mount option %q is unknown or not allowed: allowed are %s", name, strings.Join(slices.Sorted(maps.Keys(allowed)), ", "))
		}
		if pattern == "" {
			if has {
				return fault.New(fault.Invalid, "mount option %q takes no value", name)
			}
			continue
		}
		re, err := regexp.Compile("^(?:" + pattern + ")$")
		if err != nil {
			return fault.New(fault.Internal, "the pattern of mount option %q: %w", name, err)
		}
		if !has || !re.MatchString(value) {
			return fault.New(fault.Invalid, "mount option %q: its value has to match %s", name, pattern)
		}
	}
	return nil
}
