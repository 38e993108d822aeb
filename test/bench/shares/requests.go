package main

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// requests are what a kernel has asked of a server, counted by kind.
type requests map[string]int64

// ofNFS reads /proc/self/mountstats: the calls of the only NFS mount below a folder. What a mount
// asks by other protocols (MOUNT, NLM, the lease of NFS 4) is not in there.
func ofNFS(text, below string) (requests, error) {
	var out requests
	mine, counts := false, false
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		switch {
		case len(f) >= 8 && f[0] == "device": // <source> mounted on <point> with fstype <type> ...
			mine, counts = f[3] == "on" && strings.HasPrefix(f[4], below+"/") && strings.HasPrefix(f[7], "nfs"), false
			if mine && out != nil {
				return nil, fmt.Errorf("mountstats has several NFS mounts below %s", below)
			}
			if mine {
				out = requests{}
			}
		case mine && strings.TrimSpace(line) == "per-op statistics":
			counts = true
		case mine && counts && len(f) > 1 && strings.HasSuffix(f[0], ":"):
			n, err := strconv.ParseInt(f[1], 10, 64) // operations; behind it transmissions, time-outs, bytes, times
			if err != nil {
				return nil, fmt.Errorf("mountstats: %q: %w", strings.TrimSpace(line), err)
			}
			out[strings.TrimSuffix(f[0], ":")] = n
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("mountstats has no calls of an NFS mount below %s", below)
	}
	return out, nil
}

// ofSMB reads /proc/fs/cifs/Stats: the commands of the only connection to a share. Several commands
// may travel in one message: the kernel opens, asks and closes in one round trip.
func ofSMB(text, share string) (requests, error) {
	tree := regexp.MustCompile(`^\d+\) \\\\[^\\]+\\(\S+)`)                    // 1) \\server\share
	command := regexp.MustCompile(`^(\w+): (\d+) (?:total|sent) \d+ failed$`) // Creates: 3 total 1 failed
	var out requests
	mine := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if m := tree.FindStringSubmatch(line); m != nil {
			mine = m[1] == share
			if mine && out != nil {
				return nil, fmt.Errorf("cifs' statistics have several connections to share %s", share)
			}
			if mine {
				out = requests{}
			}
		} else if m := command.FindStringSubmatch(line); mine && m != nil {
			n, err := strconv.ParseInt(m[2], 10, 64)
			if err != nil {
				return nil, fmt.Errorf("cifs' statistics: %q: %w", line, err)
			}
			out[m[1]] = n
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("cifs' statistics have no commands to share %s", share)
	}
	return out, nil
}

// since is what was asked after an earlier count.
func (r requests) since(before requests) requests {
	out := requests{}
	for kind, n := range r {
		if n -= before[kind]; n != 0 {
			out[kind] = n
		}
	}
	return out
}

// sum of some kinds; of all without one.
func (r requests) sum(kinds ...string) (n int64) {
	for kind, count := range r {
		if len(kinds) == 0 || slices.Contains(kinds, kind) {
			n += count
		}
	}
	return n
}

// top names the kinds asked for most.
func (r requests) top(n int) string {
	kinds := slices.SortedFunc(maps.Keys(r), func(a, b string) int {
		if r[a] != r[b] {
			return int(r[b] - r[a])
		}
		return strings.Compare(a, b)
	})
	var words []string
	for _, kind := range kinds[:min(n, len(kinds))] {
		words = append(words, fmt.Sprintf("%d %s", r[kind], kind))
	}
	return strings.Join(words, ", ")
}

// median of several counts of the same, kind by kind.
func median(all []requests) requests {
	kinds := map[string]bool{}
	for _, r := range all {
		for kind := range r {
			kinds[kind] = true
		}
	}
	out := requests{}
	for kind := range kinds {
		var counts []int64
		for _, r := range all {
			counts = append(counts, r[kind])
		}
		slices.Sort(counts)
		if n := counts[len(counts)/2]; n != 0 {
			out[kind] = n
		}
	}
	return out
}
