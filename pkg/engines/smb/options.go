package smb

import (
	"maps"
	"slices"
	"strings"

	"github.com/quarry-csi/quarry/pkg/engines/share"
	"github.com/quarry-csi/quarry/pkg/fault"
)

const number = `[0-9]{1,9}`

// everywhere are options that a whole domain and a class may have, with what their values match:
// how this node speaks to the server. None of them changes what is stored.
func everywhere() map[string]string {
	return map[string]string{
		"seal": "", "sign": "",
		"hard": "", "serverino": "", "nounix": "", "mfsymlinks": "", // Quarry's own; naming them is no mistake
		"rsize": number, "wsize": number,
		"multichannel": "", "max_channels": `[1-9]|1[0-6]`,
		"echo_interval":     `[1-9][0-9]?|[1-5][0-9]{2}|600`,
		"persistenthandles": "", "resilienthandles": "", "handletimeout": number,
		"nosharesock": "", "nodfs": "",
	}
}

// ofClasses are options of directory volumes alone: what users of a volume see.
func ofClasses() map[string]string {
	return map[string]string{
		"uid": number, "gid": number, "forceuid": "", "forcegid": "", "noforceuid": "", "noforcegid": "",
		"file_mode": `0?[0-7]{3,4}`, "dir_mode": `0?[0-7]{3,4}`,
		"noperm": "", "dynperm": "", "cifsacl": "", "idsfromsid": "", "modefromsid": "",
		"nobrl": "", "cache": "strict|none", "closetimeo": number,
		"actimeo": number, "acregmax": number, "acdirmax": number,
		"mapposix": "", "mapchars": "", "sfu": "", "user_xattr": "", "nouser_xattr": "",
	}
}

// refused says why an option is not taken that somebody may well ask for.
func refused() map[string]string {
	const (
		login    = "user and password are the domain's secrets: they belong into its secretsFile, not into options"
		place    = "the place is the domain's params"
		stale    = "this node would show what another node has already changed"
		unsynced = "fsync would return before the data are safe at the server"
	)
	out := map[string]string{
		"soft":         "writes fail for good when the server is away for a moment, and data are lost; \"hard\" is always set",
		"retry":        "whoever mounts tries again",
		"nostrictsync": unsynced, "nosync": unsynced,
		"noserverino": "without the server's inode numbers two names of one file look like two files",
		"locallease":  stale, "fsc": stale, "handlecache": stale,
		"guest":     "a domain belongs to one user, or anybody could change it",
		"multiuser": "all of a volume is written as the domain's user; a node has no passwords of others",
		"vers":      "the version is the domain's parameter \"version\"",
		"sec":       "users prove who they are by NTLMv2; Kerberos needs tickets that a node does not have",
		"snapshot":  "a mount of an earlier state cannot be written",
		"posix":     "the POSIX extensions are experimental in the kernel", "unix": "the POSIX extensions are experimental in the kernel",
		"sloppy": "an option that the kernel does not know has to be an error",
	}
	for _, name := range []string{"username", "user", "password", "pass", "password2", "pass2", "credentials", "cred", "domain", "dom", "workgroup", "domainauto"} {
		out[name] = login
	}
	for _, name := range []string{"ip", "addr", "port", "unc", "source", "servern", "servernetbiosname", "netbiosname", "prefixpath", "target"} {
		out[name] = place
	}
	return out
}

// checkDomainOptions verifies the parameter "options". The error is fault.Invalid.
func checkDomainOptions(options []string, version dialect) error {
	no := refused()
	for name := range ofClasses() {
		no[name] = "it changes what users of a directory volume see, and belongs into the mountOptions of a class"
	}
	no["nobrl"] = "a domain always has it, and a class may have it for its volumes"
	no["cache"] = "nothing of a domain is cached; a class may choose \"strict\" or \"none\" for its volumes"
	if err := share.Allow(options, everywhere(), no); err != nil {
		return err
	}
	return checkTogether(options, version)
}

// checkClassOptions verifies a class's mount options. The error is fault.Invalid.
func checkClassOptions(options []string, version dialect) error {
	allowed, no := everywhere(), refused()
	maps.Copy(allowed, ofClasses())
	for _, o := range options {
		if value, is := strings.CutPrefix(o, "cache="); is && value != "strict" && value != "none" {
			return fault.New(fault.Invalid, "mount option %q is refused: only \"strict\" and \"none\" see what other nodes write, and lose nothing", o)
		}
	}
	if err := share.Allow(options, allowed, no); err != nil {
		return err
	}
	return checkTogether(options, version)
}

// checkTogether refuses options that a version of the protocol does not have.
func checkTogether(options []string, version dialect) error {
	for _, o := range options {
		name, _, _ := strings.Cut(o, "=")
		if version == smb210 && slices.Contains([]string{"seal", "multichannel", "max_channels", "persistenthandles"}, name) {
			return fault.New(fault.Invalid, "mount option %q: SMB %s has no such thing: version 3.0 or higher is needed", name, version)
		}
	}
	return nil
}
