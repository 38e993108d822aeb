package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/quarry-csi/quarry/pkg/block"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
)

// Status is how bad a condition is; the values of the CSI specification.
type Status string

// The statuses of volumes.
const (
	Degraded     Status = "DEGRADED"     // usable, not as it should be
	Inaccessible Status = "INACCESSIBLE" // from this node
	DataLoss     Status = "DATA_LOSS"    // known or strongly suspected
)

// The statuses of storage.
const (
	StorageDegraded    Status = "STORAGE_DEGRADED"
	StorageUnreachable Status = "STORAGE_UNREACHABLE"
)

// Condition is one thing that is wrong. Status and Reason occur together once
// in a report.
type Condition struct {
	Status  Status
	Reason  string // CamelCase, for machines
	Message string
}

// Health says what is wrong with an image as seen from this node; nothing
// means that no problem is known. It may be asked of an image that could not be
// staged. It never waits long for storage that does not answer.
// fault.NotFound: there is no such image.
func (n *Node) Health(ctx context.Context, h image.Handle) ([]Condition, error) {
	s, err := n.find(ctx, h)
	if errors.Is(err, fault.Unavailable) {
		return []Condition{{Inaccessible, "StorageNotResponding", err.Error()}}, nil
	}
	if err != nil {
		return nil, fault.In(err, "examine", h.Domain, h.Image)
	}
	if s.anchor != nil || len(s.devices) > 0 {
		return n.examine(ctx, h, s), nil
	}
	c, err := n.examineSlab(ctx, h)
	return c, fault.In(err, "examine", h.Domain, h.Image)
}

// examine looks at an image that is staged.
func (n *Node) examine(ctx context.Context, h image.Handle, s state) []Condition {
	if why := s.paused(); why != "" { // a look would wait as well
		return []Condition{{Degraded, "WritesPaused", "reads and writes wait: " + why}}
	}
	var out []Condition
	for i := range s.devices {
		if s.devices[i].Use != block.View {
			out = append(out, n.examineDevice(ctx, s.devices[i])...)
		}
	}
	n.mu.Lock()
	f := n.frozen[h]
	n.mu.Unlock()
	if f != nil && f.Holds() {
		return append(out, Condition{Degraded, "Frozen", "writing waits while a snapshot is being taken"})
	}
	if !s.raw() && len(s.mounts) > 0 {
		out = append(out, n.examineMount(ctx, s)...)
	}
	return once(out)
}

// examineDevice compares the device with the slab below it, and reads from it.
func (n *Node) examineDevice(ctx context.Context, d block.Device) []Condition {
	if path, gone := strings.CutSuffix(d.Backing, " (deleted)"); gone {
		return []Condition{{DataLoss, "SlabMissing", fmt.Sprintf("%s was deleted while %s used it: its content is lost when the volume is unstaged", path, d.Path)}}
	}
	fi, err := n.host.Stat(ctx, d.Backing)
	switch {
	case errors.Is(err, fault.Unavailable), errors.Is(err, fault.Deadline):
		return []Condition{{Inaccessible, "StorageNotResponding", err.Error()}}
	case errors.Is(err, fault.NotFound):
		if _, err := n.host.Stat(ctx, filepath.Dir(d.Backing)); errors.Is(err, fault.NotFound) {
			break // it was attached by an earlier process, whose mount of the share nobody sees any more
		}
		return []Condition{{DataLoss, "SlabMissing", fmt.Sprintf("%s, which %s uses, cannot be found", d.Backing, d.Path)}}
	case err != nil:
		return []Condition{{Inaccessible, "SlabUnreadable", err.Error()}}
	case fi.Dev != d.Dev || fi.Inode != d.Inode:
		return []Condition{{DataLoss, "SlabReplaced", fmt.Sprintf("%s is no longer the file that %s uses: what is written now is lost when the volume is unstaged", d.Backing, d.Path)}}
	case fi.Mode.IsRegular() && fi.Size < d.Size:
		return []Condition{{DataLoss, "SlabTruncated", fmt.Sprintf("%s has %d bytes, and %s needs %d", d.Backing, fi.Size, d.Path, d.Size)}}
	}
	if err := n.host.ReadDevice(ctx, d.Path); err != nil {
		return []Condition{{Inaccessible, "ReadError", err.Error()}}
	}
	return nil
}

// examineMount looks at the filesystem.
func (n *Node) examineMount(ctx context.Context, s state) []Condition {
	var out []Condition
	for _, m := range s.mounts {
		if m.ShutDown() {
			out = append(out, Condition{Inaccessible, "FilesystemShutDown", "the filesystem gave up after errors: unstage the volume and stage it again"})
		} else if m.TurnedReadOnly() && s.anchor == nil {
			out = append(out, Condition{Degraded, "FilesystemReadOnly", "the filesystem turned read-only after errors: unstage the volume and stage it again, which checks it"})
		}
	}
	m := s.mounts[0]
	if _, err := n.host.Usage(ctx, m.Point); err != nil {
		out = append(out, unusable(err))
	} else if _, err := n.host.Stat(ctx, m.Point); err != nil {
		out = append(out, unusable(err))
	}
	if d := s.device(block.Filesystem); d != nil && m.Type == host.Ext4 {
		if count := ext4Errors(d.Path); count != "" && count != "0" {
			out = append(out, Condition{Degraded, "FilesystemErrors", "ext4 has counted " + count + " errors: unstage the volume and stage it again, which checks it"})
		}
	}
	return out
}

func unusable(err error) Condition {
	if errors.Is(err, fault.Unavailable) && !hasErrno(err) {
		return Condition{Inaccessible, "StorageNotResponding", err.Error()}
	}
	return Condition{Inaccessible, "FilesystemError", err.Error()}
}

// hasErrno says whether the kernel did answer, with an error.
func hasErrno(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno)
}

// ext4Errors is the kernel's count of errors that a filesystem has on record.
func ext4Errors(device string) string {
	b, err := os.ReadFile(filepath.Join("/sys/fs/ext4", filepath.Base(device), "errors_count"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// examineSlab looks at an image that is not staged.
func (n *Node) examineSlab(ctx context.Context, h image.Handle) ([]Condition, error) {
	im, err := n.cfg.Manager.Outline(ctx, h, n.cfg.NodeID)
	if errors.Is(err, fault.Unavailable) {
		return []Condition{{Inaccessible, "DomainUnavailable", err.Error()}}, nil
	}
	if err != nil {
		return nil, err
	}
	e, err := n.cfg.Engines(h.Domain)
	if err != nil {
		return []Condition{{Inaccessible, "DomainUnavailable", err.Error()}}, nil
	}
	var out []Condition
	err = n.host.Within(ctx, "examine slab "+slabKey(h.Domain, im.Slabs[0].ID), examineTimeout, func() (err error) {
		out, err = n.lookAt(context.WithoutCancel(ctx), e, h, im.Slabs[0].ID, im.Size)
		return err
	})
	if errors.Is(err, fault.Unavailable) || errors.Is(err, fault.Deadline) {
		return []Condition{{Inaccessible, "StorageNotResponding", err.Error()}}, nil
	}
	if err != nil {
		return nil, err
	}
	return out, nil
}

// lookAt attaches a slab, looks, and detaches it again.
func (n *Node) lookAt(ctx context.Context, e *engine.Users, h image.Handle, slab string, size int64) ([]Condition, error) {
	unlock, held := n.tryLock(h)
	if held != nil {
		return nil, nil // it is just being staged, which finds out the same
	}
	l := n.beginLook(h, slab)
	unlock()
	if l == nil {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, examineTimeout)
	defer cancel()
	a, release, attachErr := e.Attach(ctx, slab, engine.AttachOptions{ReadOnly: true})
	var out []Condition
	switch {
	case attachErr == nil:
		out = n.compare(ctx, a.Path, size)
	case errors.Is(attachErr, fault.NotFound):
		out = []Condition{{DataLoss, "SlabMissing", attachErr.Error()}}
	case errors.Is(attachErr, fault.Corrupt):
		out = []Condition{{DataLoss, "SlabDamaged", attachErr.Error()}}
	default:
		out = []Condition{{Inaccessible, "StorageNotResponding", attachErr.Error()}}
	}
	mine, err := n.endLook(l, h, slab, func() error {
		if attachErr != nil {
			return nil
		}
		return release(ctx, true)
	})
	if attachErr == nil { // it stays, if it is not ours to detach
		err = errors.Join(err, release(ctx, false))
	}
	if !mine {
		return nil, err
	}
	return out, err
}

// compare looks whether an attached slab is as large as was recorded.
func (n *Node) compare(ctx context.Context, path string, size int64) []Condition {
	fi, err := n.host.Stat(ctx, path)
	switch {
	case err != nil:
		return []Condition{{Inaccessible, "SlabUnreadable", err.Error()}}
	case fi.Mode&fs.ModeType == 0 && fi.Size < size:
		return []Condition{{DataLoss, "SlabTruncated", fmt.Sprintf("%s has %d bytes, and %d were recorded", path, fi.Size, size)}}
	}
	return nil
}

const examineTimeout = 10 * time.Second

// once keeps the first condition of each status and reason.
func once(in []Condition) []Condition {
	type key struct {
		Status
		string
	}
	seen := map[key]bool{}
	var out []Condition
	for _, c := range in {
		if k := (key{c.Status, c.Reason}); !seen[k] {
			seen[k] = true
			out = append(out, c)
		}
	}
	return out
}

// StorageHealth says which of the domains cannot be reached from this node,
// and whether calls hang.
func (n *Node) StorageHealth(ctx context.Context, domains []string) []Condition {
	var lost, warned []string
	for _, d := range domains {
		switch warning, err := n.reach(ctx, d); {
		case err != nil:
			lost = append(lost, fmt.Sprintf("domain %s: %v", d, err))
		case warning != "":
			warned = append(warned, fmt.Sprintf("domain %s: %s", d, warning))
		}
	}
	var out []Condition
	if len(warned) > 0 {
		out = append(out, Condition{StorageDegraded, "DomainDegraded", strings.Join(warned, "; ")})
	}
	if len(lost) > 0 {
		out = append(out, Condition{StorageUnreachable, "DomainUnreachable", strings.Join(lost, "; ")})
	}
	if scarce := n.guard.scarce(); len(scarce) > 0 {
		out = append(out, Condition{StorageDegraded, "WritesPaused", strings.Join(scarce, "; ")})
	}
	if hang := n.host.Abandoned(); hang > 0 {
		out = append(out, Condition{StorageDegraded, "CallsHang", fmt.Sprintf("%d system calls hang on storage that does not answer", hang)})
	}
	return out
}

// reach asks a domain's storage how it is.
func (n *Node) reach(ctx context.Context, domain string) (warning string, err error) {
	e, err := n.cfg.Engines(domain)
	if err != nil {
		return "", err
	}
	err = n.host.Within(ctx, "reach domain "+domain, examineTimeout, func() error {
		if m := engine.Discover(e.Engine).Meter; m != nil {
			u, err := m.DomainUsage(context.WithoutCancel(ctx))
			warning = u.Warning
			return err
		}
		_, err := e.Engine.Describe(context.WithoutCancel(ctx))
		return err
	})
	if err != nil { // what still hangs may write its result late
		return "", err
	}
	return warning, nil
}
