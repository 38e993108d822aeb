package host

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"strings"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Signature is what blkid finds on a device.
type Signature struct {
	Type       string // "ext4", "xfs", "LVM2_member", ...; "" for none
	UUID       string
	Partitions string // "dos", "gpt", ...; "" for none
	// Ambivalent: signatures of several kinds that contradict each other.
	Ambivalent bool
}

// Empty says that nothing known is on the device.
func (s Signature) Empty() bool { return s.Type == "" && s.Partitions == "" && !s.Ambivalent }

// String says it for messages.
func (s Signature) String() string {
	switch {
	case s.Ambivalent:
		return "contradicting signatures"
	case s.Type != "" && s.Partitions != "":
		return s.Type + " and a " + s.Partitions + " partition table"
	case s.Type != "":
		return s.Type
	case s.Partitions != "":
		return "a " + s.Partitions + " partition table"
	}
	return "nothing"
}

// Probe looks for signatures on a device, past blkid's cache. blkid answers
// "nothing found" also for what it cannot read, so that is read then as well.
func (l *Local) Probe(ctx context.Context, device string) (Signature, error) {
	if err := l.ReadDevice(ctx, device); err != nil {
		return Signature{}, err
	}
	c := Command{Name: "blkid", Args: []string{"-p", "-o", "export", "--", device}, Timeout: time.Minute}
	res, err := l.run.Run(ctx, c)
	var exit *ExitError
	if errors.As(err, &exit) {
		switch exit.Result.ExitCode {
		case 2:
			return Signature{}, l.readEnds(ctx, device)
		case 8:
			return Signature{Ambivalent: true}, nil
		}
		return Signature{}, fault.New(fault.Unavailable, "look for a filesystem on %s: %w", device, err)
	}
	if err != nil {
		return Signature{}, err
	}
	return parseProbe(string(res.Stdout)), nil
}

// readEnds fails if a device cannot be read where signatures lie: libblkid looks
// into its first and its last two MiB.
func (l *Local) readEnds(ctx context.Context, device string) error {
	const end = 2 << 20
	return l.guard.Do(ctx, "read both ends of "+device, quick, func() error {
		f, err := openFile(device, os.O_RDONLY)
		if err != nil {
			return ioError("read", device, err)
		}
		defer f.Close()
		size, err := f.Seek(0, io.SeekEnd)
		buf := make([]byte, end) // at once: over a network each read is a round trip
		for _, from := range []int64{0, max(0, size-end)} {
			if err == nil {
				_, err = f.ReadAt(buf, from)
			}
			if errors.Is(err, io.EOF) {
				err = nil
			}
		}
		return ioError("read", device, err)
	})
}

func parseProbe(text string) Signature {
	var s Signature
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch key {
		case "TYPE":
			s.Type = value
		case "UUID":
			s.UUID = value
		case "PTTYPE":
			s.Partitions = value
		}
	}
	return s
}

// Superblock is what Quarry reads of a filesystem by itself.
type Superblock struct {
	Size  int64 // bytes that the filesystem spans
	Block int64 // its block size
	// Dirty: a log waits to be replayed. Not known, and false, for xfs.
	Dirty bool
}

// Superblock reads a filesystem's superblock from its device.
// fault.Corrupt: there is none of that type.
func (l *Local) Superblock(ctx context.Context, device, fsType string) (Superblock, error) {
	return guarded(ctx, &l.guard, "read the superblock of "+device, quick, func() (Superblock, error) {
		f, err := openFile(device, os.O_RDONLY)
		if err != nil {
			return Superblock{}, ioError("read", device, err)
		}
		defer f.Close()
		at := map[string]int64{Ext4: 1024, XFS: 0, Btrfs: 65536}[fsType]
		b := make([]byte, 4096)
		if _, err := f.ReadAt(b, at); err != nil {
			return Superblock{}, ioError("read the superblock of", device, err)
		}
		sb, ok := parseSuperblock(fsType, b)
		if !ok {
			return sb, fault.New(fault.Corrupt, "%s does not begin with the superblock of %s", device, fsType)
		}
		return sb, nil
	})
}

// parseSuperblock knows the fixed parts of three on-disk formats: fs/ext4/ext4.h,
// fs/xfs/libxfs/xfs_format.h, include/uapi/linux/btrfs_tree.h.
func parseSuperblock(fsType string, b []byte) (sb Superblock, ok bool) {
	le, be := binary.LittleEndian, binary.BigEndian
	switch fsType {
	case Ext4:
		const has64Bit, needsRecovery = 0x80, 0x4
		incompat := le.Uint32(b[0x60:])
		blocks := int64(le.Uint32(b[4:]))
		if incompat&has64Bit != 0 {
			blocks |= int64(le.Uint32(b[0x150:])) << 32
		}
		sb.Block = 1024 << (le.Uint32(b[24:]) & 31)
		sb.Size = blocks * sb.Block
		sb.Dirty = incompat&needsRecovery != 0
		return sb, le.Uint16(b[0x38:]) == 0xEF53
	case XFS:
		sb.Block = int64(be.Uint32(b[4:]))
		sb.Size = int64(be.Uint64(b[8:])) * sb.Block
		return sb, string(b[:4]) == "XFSB"
	case Btrfs:
		sb.Size = int64(le.Uint64(b[0x70:]))
		sb.Block = int64(le.Uint32(b[0x90:]))
		sb.Dirty = le.Uint64(b[0x60:]) != 0 // the log tree's root
		return sb, string(b[0x40:0x48]) == "_BHRfS_M"
	}
	return sb, false
}
