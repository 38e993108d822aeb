package host

import (
	"os"
	"strconv"
	"strings"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Mount is one line of /proc/self/mountinfo; see proc(5).
type Mount struct {
	ID, Parent   int
	Major, Minor uint32 // of the filesystem; btrfs invents one
	Root         string // what of the filesystem is seen: "/" is all of it; of NFS a path at the server
	Point        string
	Options      []string // of this mount
	Type         string
	Source       string
	Super        []string // options of the filesystem
}

// ReadOnly says whether nothing can be written through this mount.
func (m Mount) ReadOnly() bool { return has(m.Options, "ro") || has(m.Super, "ro") }

// TurnedReadOnly says whether the filesystem refuses writes although this
// mount allows them: after errors.
func (m Mount) TurnedReadOnly() bool { return !has(m.Options, "ro") && has(m.Super, "ro") }

// ShutDown says whether the filesystem gave up after errors.
func (m Mount) ShutDown() bool { return has(m.Super, "shutdown") || has(m.Super, "emergency_ro") }

// SameTree says whether two mounts show the same directory of the same filesystem.
func (m Mount) SameTree(o Mount) bool {
	return m.Major == o.Major && m.Minor == o.Minor && m.Root == o.Root
}

// PartOf says whether a mount shows something below the directory that the
// other shows, and not that directory itself.
func (m Mount) PartOf(o Mount) bool {
	const deleted = "//deleted" // what the kernel adds to a name that is gone; see dentry_path
	name := strings.TrimSuffix(strings.TrimSuffix(o.Root, deleted), "/")
	return m.Major == o.Major && m.Minor == o.Minor && m.Root != o.Root &&
		strings.HasPrefix(m.Root, name+"/") && m.Root != name+deleted
}

func has(list []string, word string) bool {
	for _, w := range list {
		if w == word {
			return true
		}
	}
	return false
}

// Mounts lists the mounts of this process's namespace, in the order in which
// they cover each other. It does not touch what is mounted and cannot hang.
func (l *Local) Mounts() ([]Mount, error) {
	const file = "/proc/self/mountinfo"
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, ioError("read", file, err)
	}
	return parseMountInfo(string(b))
}

// MountsAt lists the mounts whose mount point is exactly path, the visible one last.
func (l *Local) MountsAt(path string) ([]Mount, error) {
	all, err := l.Mounts()
	if err != nil {
		return nil, err
	}
	var out []Mount
	for _, m := range all {
		if m.Point == path {
			out = append(out, m)
		}
	}
	return out, nil
}

func parseMountInfo(text string) ([]Mount, error) {
	var out []Mount
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		left, right, ok := strings.Cut(line, " - ")
		a, b := strings.Fields(left), strings.Split(right, " ")
		if !ok || len(a) < 6 || len(b) < 3 {
			return nil, fault.New(fault.Internal, "mountinfo line %q is not of the form in proc(5)", line)
		}
		m := Mount{Root: unescape(a[3]), Point: unescape(a[4]), Options: strings.Split(a[5], ","),
			Type: b[0], Source: unescape(b[1]), Super: strings.Split(b[2], ",")}
		var errs [4]error
		m.ID, errs[0] = strconv.Atoi(a[0])
		m.Parent, errs[1] = strconv.Atoi(a[1])
		major, minor, _ := strings.Cut(a[2], ":")
		m.Major, errs[2] = number(major)
		m.Minor, errs[3] = number(minor)
		for _, err := range errs {
			if err != nil {
				return nil, fault.New(fault.Internal, "mountinfo line %q: %w", line, err)
			}
		}
		if m.Type == "nfs" || m.Type == "nfs4" {
			m.Root = nfsRoot(m)
		}
		out = append(out, m)
	}
	return out, nil
}

// nfsRoot is what an NFS mount shows of its server. The kernel says "/" of each, also of one that is bound from
// somewhere inside; but its source is the whole name of what is shown: "nas:/export/slabs/a/data", "[fe80::1]:/export".
func nfsRoot(m Mount) string {
	if at := strings.Index(m.Source, ":/"); at >= 0 && !strings.HasPrefix(m.Source, "[") {
		return m.Source[at+1:]
	}
	if at := strings.Index(m.Source, "]:/"); at >= 0 {
		return m.Source[at+2:]
	}
	return m.Root
}

func number(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err
}

// unescape undoes the octal escapes for blanks and backslashes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
