package nfs

import (
	"maps"

	"github.com/quarry-csi/quarry/pkg/engines/share"
)

// Options are mount options that one engine allows beside those that both do, and what it refuses with its reason: see share.Allow.
type Options struct {
	// Domain and Class are allowed in a domain's parameter "options", and in a class's mountOptions.
	Domain, Class map[string]string
	// Refused is never allowed.
	Refused map[string]string
}

// Patterns of options' values.
const (
	flag    = "" // an option without a value
	number  = `0|[1-9][0-9]{0,8}`
	bytes   = `[1-9][0-9]{3,7}` // of a read or write request: from 1 KiB; the kernel rounds
	port    = `[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]`
	streams = `[1-9]|1[0-6]`
	// Security is the pattern of sec=.
	Security = `sys|krb5|krb5i|krb5p`
	// Port is the pattern of a port.
	Port = port
)

// connection are the options of a whole connection to a server: a domain has them, for its own mount and
// those of its trees.
func connection() map[string]string {
	return map[string]string{"port": port, "nconnect": streams, "resvport": flag, "noresvport": flag,
		"rsize": bytes, "wsize": bytes, "timeo": `[1-9][0-9]{0,5}`, "retrans": `[0-9]{1,3}`, "hard": flag}
}

// caching are the options that one mount has for itself: a class has them, for its trees.
func caching() map[string]string {
	return map[string]string{"rsize": bytes, "wsize": bytes, "timeo": `[1-9][0-9]{0,5}`, "retrans": `[0-9]{1,3}`, "hard": flag,
		"actimeo": number, "acregmin": number, "acregmax": number, "acdirmin": number, "acdirmax": number, "ac": flag, "noac": flag,
		"lookupcache": `all|none|pos|positive`, "cto": flag, "rdirplus": flag, "nordirplus": flag, "fsc": flag, "nofsc": flag,
		"sync": flag, "async": flag, "dirsync": flag, "ro": flag, "rw": flag, "noatime": flag, "nodiratime": flag, "relatime": flag}
}

// dangerous are options that are refused wherever they are given, and why.
func dangerous() map[string]string {
	const (
		lost    = "what was written would be lost when the server is away for a while: Quarry's mounts are always hard"
		locks   = "locks would hold on one node only, and two nodes could have the same one"
		tcp     = "Quarry always uses TCP: fragments of UDP are put together wrongly at the speed of today's networks, see nfs(5)"
		names   = "the engine finds the server's address itself, from the parameter \"server\""
		retries = "it is for the program mount(8): Quarry tries again by itself"
		version = "the engine's type is its version"
	)
	refused := map[string]string{
		"soft": lost, "softerr": lost,
		"softreval":    "what is cached would be shown as if the server had just said so, when it is away",
		"nolock":       locks,
		"local_lock":   locks,
		"nocto":        "what another node has written and closed might not be seen",
		"nosharecache": "two mounts on one node would not see each other's writes",
		"sharecache":   "it is always so",
		"intr":         "it has had no effect since Linux 2.6.25", "nointr": "it has had no effect since Linux 2.6.25",
		"noacl": "access control lists would be missing in copies of directories",
		"v2":    "NFS 2 has no files above 2 GiB, and makes nothing exclusively",
		"udp":   tcp, "tcp": tcp, "proto": tcp, "rdma": "only TCP is built", "mountproto": tcp,
		"addr": names, "mountaddr": names, "mounthost": names, "clientaddr": "the kernel finds it itself",
		"bg": retries, "fg": retries, "retry": retries, "sloppy": "it would hide mistakes",
		"mountvers": version, "namlen": "the server says it", "bsize": "it has no effect",
	}
	for _, o := range []string{"vers", "nfsvers", "minorversion", "v3", "v4", "v4.0", "v4.1", "v4.2"} {
		refused[o] = version
	}
	return refused
}

func checkDomainOptions(options []string, more Options) error {
	allowed, refused := connection(), dangerous()
	maps.Copy(allowed, more.Domain)
	for o := range caching() {
		refused[o] = "the domain's own mount has to see at once what other nodes did; a class's mountOptions may have it, for its directory volumes"
	}
	maps.Copy(refused, more.Refused)
	for o := range allowed {
		delete(refused, o)
	}
	return share.Allow(options, allowed, refused)
}

// CheckClass refuses a class's mount options that no directory volume may have.
func CheckClass(options []string, more Options) error {
	allowed, refused := caching(), dangerous()
	maps.Copy(allowed, more.Class)
	for o := range connection() {
		refused[o] = "all mounts of a server on a node share their connections: it belongs into the domain's parameter \"options\""
	}
	maps.Copy(refused, more.Refused)
	for o := range allowed {
		delete(refused, o)
	}
	return share.Allow(options, allowed, refused)
}
