// Package nfs is what the engines of NFS 3 and of NFS 4 have in common: the parameters that name an
// export, how its server is reached and asked, and what the kernel's answers to a mount mean. How
// the two protocols differ is not in here.
package nfs

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/quarry-csi/quarry/pkg/engines/share"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// DefaultPort of a server's NFS service.
const DefaultPort = 2049

// maxPath is the longest path that the MOUNT protocol carries (RFC 1813, MNTPATHLEN).
const maxPath = 1024

// Params are the parameters that both engines take, with one line of help each.
func Params() map[string]string {
	return map[string]string{
		"server":  "name or address of the server (required)",
		"export":  "path of the export on it, as clients name it (required)",
		"folder":  "folder of the export that belongs to Quarry alone, made if it is missing (default: all of the export)",
		"options": "options for all mounts, separated by commas: " + strings.Join(slices.Sorted(maps.Keys(connection())), ", "),
	}
}

// Export is a directory that a server exports, and a folder in it.
type Export struct {
	Server, Path, Folder string
	// Options are the domain's, checked.
	Options []string
}

// Parse reads and checks an export's parameters. known are all that the engine takes, more the options that
// only it allows. The error is fault.Invalid.
func Parse(engine string, known, params map[string]string, more Options) (Export, error) {
	for _, name := range slices.Sorted(maps.Keys(params)) {
		if _, ok := known[name]; !ok {
			return Export{}, fault.New(fault.Invalid, "parameter %q is unknown: engine %s knows %s", name, engine, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		}
	}
	x := Export{Server: params["server"], Path: params["export"]}
	if err := checkServer(x.Server); err != nil {
		return Export{}, err
	}
	if err := checkExport(x.Path); err != nil {
		return Export{}, err
	}
	var err error
	if x.Folder, err = share.Folder(params["folder"]); err != nil {
		return Export{}, err
	}
	if longest := path.Join(x.Path, x.Folder); len(longest) > maxPath/2 { // the other half is for the slabs in it
		return Export{}, fault.New(fault.Invalid, "parameters \"export\" and \"folder\" make a path of %d bytes: at most %d are allowed", len(longest), maxPath/2)
	}
	if list := params["options"]; list != "" {
		x.Options = strings.Split(list, ",")
	}
	if err := checkDomainOptions(x.Options, more); err != nil {
		return Export{}, fault.New(fault.Invalid, "parameter \"options\": %w", err)
	}
	return x, nil
}

// Place is where checked parameters lead, in words that are the same for both versions.
func Place(params map[string]string) string {
	return "nfs://" + strings.ToLower(strings.TrimSuffix(params["server"], ".")) + path.Join("/", params["export"], params["folder"])
}

func checkServer(server string) error {
	if _, err := netip.ParseAddr(server); err == nil {
		return nil
	}
	switch {
	case server == "":
		return fault.New(fault.Invalid, "parameter \"server\" is missing: the name or address of an NFS server is needed")
	case strings.Contains(server, "/"):
		return fault.New(fault.Invalid, "parameter \"server\" is %q: only the server's name or address belongs there, its path into \"export\"", server)
	case strings.ContainsAny(server, ":[]"):
		return fault.New(fault.Invalid, "parameter \"server\" is %q: a name, or an IPv4 or IPv6 address without brackets, is needed; a port is given by \"options\": port=N", server)
	case len(server) > 253 || !regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9])?\.?$`).MatchString(server):
		return fault.New(fault.Invalid, "parameter \"server\" is %q: that is neither a host's name nor an address", server)
	}
	return nil
}

func checkExport(export string) error {
	switch {
	case export == "":
		return fault.New(fault.Invalid, "parameter \"export\" is missing: the path that the server exports is needed")
	case !path.IsAbs(export):
		return fault.New(fault.Invalid, "parameter \"export\" is %q: an absolute path is needed, such as /export/k8s", export)
	case strings.ContainsFunc(export, unicode.IsControl):
		return fault.New(fault.Invalid, "parameter \"export\" is %q: it has a control character", export)
	case path.Clean(export) != export:
		return fault.New(fault.Invalid, "parameter \"export\" is %q: write it as %q", export, path.Clean(export))
	}
	return nil
}

// Source is what is mounted for a folder of the export ("" is the export itself), in mount(8)'s words.
func (x Export) Source(folder string) string {
	server := x.Server
	if a, err := netip.ParseAddr(server); err == nil && a.Is6() {
		server = "[" + server + "]"
	}
	return server + ":" + path.Join(x.Path, folder)
}

// Port of the NFS service: the option port, or DefaultPort.
func (x Export) Port() uint16 {
	port := uint16(DefaultPort)
	for _, o := range x.Options {
		if value, ok := strings.CutPrefix(o, "port="); ok {
			if n, err := strconv.ParseUint(value, 10, 16); err == nil { // was checked
				port = uint16(n)
			}
		}
	}
	return port
}

// Reach finds out the address at which the server answers as an NFS server of a version (3 or 4): the kernel's
// mount call resolves no names, and waits for minutes where nobody answers. fault.Unavailable: there
// is no such host, it refuses the connection, or it gives no answer. fault.Unsupported: it
// answers, and has not that version.
func (x Export) Reach(ctx context.Context, version uint32) (netip.Addr, error) {
	addresses, err := share.Resolve(ctx, x.Server)
	if err != nil {
		return netip.Addr{}, err
	}
	var why error
	for i, a := range addresses {
		// Each has its share of the time: a first one that is dead does not hide the second.
		limit, done := context.WithTimeout(ctx, answerLimit/time.Duration(len(addresses)-i))
		err := ask(limit, netip.AddrPortFrom(a, x.Port()), version)
		done()
		if err == nil {
			return a, nil
		}
		if a.String() != x.Server {
			err = fmt.Errorf("%s: %w", x.Server, err)
		}
		why = cmp.Or(why, err)
	}
	return netip.Addr{}, why
}
