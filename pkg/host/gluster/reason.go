package gluster

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// explain says why a mount has failed: the program's log has the reason, its status hardly ever.
func explain(m Mount, log string, err error) error {
	has := func(text string) bool { return strings.Contains(log, text) }
	switch servers := strings.Join(m.Servers, ", "); {
	case has("subdirectory for mount") && has("is not found"):
		return fault.New(fault.NotFound, "mount %s: volume %q has no folder %q", m, m.Volume, m.Folder)
	case has("remote-error=Authentication failed"):
		return fault.New(fault.Permission, "mount %s: the volume does not let this host in: look at its options auth.allow and auth.reject", m)
	case has("failed to fetch volume file"):
		return fault.New(fault.Invalid, "mount %s: the servers have no volume %q: \"gluster volume list\" on one of them shows those that there are", m, m.Volume)
	case has("DNS resolution failed on host"):
		return fault.New(fault.Unavailable, "mount %s: the name of server %s cannot be resolved", m, after(log, "DNS resolution failed on host "))
	case has("All subvolumes are down"), has("first lookup on root failed"):
		return fault.New(fault.Unavailable, "mount %s: a server knows the volume, but no brick of it can be reached: is it started (\"gluster volume status %s\")?", m, m.Volume)
	case errors.Is(err, unix.ENOTDIR), m.Folder != "" && errors.Is(err, unix.EIO):
		return fault.New(fault.Invalid, "mount %s: %q is not a folder that can be mounted: %w", m, m.Folder, err)
	case exitCode(err) == int(unix.ENOTCONN):
		return fault.New(fault.Unavailable, "mount %s: no server answers on port %d: %s", m, Port, servers)
	case errors.Is(err, fault.Unavailable), errors.Is(err, fault.Deadline), errors.Is(err, fault.Canceled):
		return fmt.Errorf("mount %s: %w", m, err)
	}
	if said := lastError(log); said != "" {
		return fault.New(fault.Unavailable, "mount %s: %s", m, said)
	}
	return fault.New(fault.Unavailable, "mount %s: %w", m, err)
}

func exitCode(err error) int {
	var exit *host.ExitError
	if errors.As(err, &exit) {
		return exit.Result.ExitCode
	}
	return 0
}

// after is the word that follows a text.
func after(log, text string) string {
	_, rest, _ := strings.Cut(log, text)
	word, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(word)
}

// lastError is the last line of level E (error) or worse, without its time and place.
func lastError(log string) (said string) {
	line := regexp.MustCompile(`^\[[^]]*\] [ECAM] (?:\[MSGID: \d+\] )?(?:\[[^]]*\] )?(.*)$`)
	for l := range strings.Lines(log) {
		if found := line.FindStringSubmatch(strings.TrimSpace(l)); found != nil {
			said = found[1]
		}
	}
	return said
}
