package host

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// LUKS2 headers are made and read by cryptsetup(8); the passphrase goes there by
// standard input. The devices are made here, with a UUID and a life like all
// others: cryptsetup would wait for a udev that a container does not have, and a
// killed one leaves devices under names that nobody knows. So the volume key
// comes back through a pipe and goes to the kernel, and is kept nowhere else.

// What Quarry's headers are made with; any cryptsetup from 2.4 on opens them.
const (
	luksCipher = "aes-xts-plain64"
	// LUKSSector is what is encrypted at once, in bytes. Sizes of devices are multiples of it.
	LUKSSector = 4096
	// RFC 9106's second recommendation for argon2id, 64 MiB, with one pass more,
	// which is cryptsetup's least: known costs on every node, in a small container
	// too, in place of a benchmark on the one that happens to format.
	luksMemory, luksPasses, luksLanes = 64 << 10, 4, 4 // KiB, iterations, threads

	openTimeout = 2 * time.Minute // a second, where nothing is slow
)

// Encryption says whether this node can open encrypted images: nil, or
// fault.Unsupported that names what is missing. The kernel's module is loaded if need be.
func (l *Local) Encryption(ctx context.Context) error {
	err := l.hasTarget(ctx, "crypt")
	if errors.Is(err, fault.Unsupported) {
		if why := l.modprobe(ctx, "dm-crypt"); why != nil {
			return fault.New(fault.Unsupported, "this node's kernel has no device-mapper target \"crypt\", which encryption needs: load its module \"dm-crypt\", or boot a kernel that has it (%w)", why)
		}
		err = l.hasTarget(ctx, "crypt")
	}
	if err != nil {
		return err
	}
	_, err = l.run.Run(ctx, Command{Name: cryptsetup, Args: []string{"--version"}, Timeout: openTimeout})
	return err
}

const cryptsetup = "cryptsetup"

// noLocks: cryptsetup would lock by files in /run, which a container may not have.
// One node at a time writes a header, and one call.
const noLocks = "--disable-locks"

// FormatLUKS writes a LUKS2 header with a new key to a device that holds nothing
// worth keeping. The payload begins at header, in bytes. It is durable on return;
// one that was killed leaves anything.
func (l *Local) FormatLUKS(ctx context.Context, device string, header int64, passphrase Secret) error {
	_, err := l.tool(ctx, device, Command{Name: cryptsetup, Stdin: strings.NewReader(string(passphrase)), Args: []string{
		"luksFormat", noLocks, "--type=luks2", "--batch-mode", "--key-file=-",
		"--cipher=" + luksCipher, "--key-size=512", "--hash=sha256", "--sector-size=" + strconv.Itoa(LUKSSector),
		"--pbkdf=argon2id", fmt.Sprintf("--pbkdf-memory=%d", luksMemory), fmt.Sprintf("--pbkdf-force-iterations=%d", luksPasses), fmt.Sprintf("--pbkdf-parallel=%d", luksLanes),
		fmt.Sprintf("--offset=%d", header/sector), "--", device,
	}})
	if err != nil {
		return luksError("make a LUKS2 header on", device, err)
	}
	return l.SyncDevice(ctx, device)
}

// OpenLUKS makes the device that shows the payload of another: the clear text.
//
// fault.Permission: the passphrase is not the right one. fault.Corrupt: there is no
// LUKS2 header, or not one like FormatLUKS makes. fault.Exhausted: no memory for
// argon2id. Else as CreateMapped.
func (l *Local) OpenLUKS(ctx context.Context, name, uuid, device string, header int64, readOnly bool, passphrase Secret) (Mapped, error) {
	size, err := deviceSize(device)
	if err != nil {
		return Mapped{}, err
	}
	cipher, err := l.segment(ctx, device, header)
	if err != nil {
		return Mapped{}, err
	}
	key, err := l.volumeKey(ctx, device, passphrase)
	if err != nil {
		return Mapped{}, err
	}
	// No "allow_discards": holes would tell which blocks are in use.
	return l.CreateMapped(ctx, name, uuid, readOnly, []Target{{Length: (size - header) / LUKSSector * LUKSSector, Type: "crypt", Secret: true,
		Params: fmt.Sprintf("%s %s 0 %s %d 1 sector_size:%d", cipher, key, device, header/sector, LUKSSector)}})
}

// GrowLUKS lets a device that OpenLUKS made show all of a device below that
// has grown. It needs no passphrase: the kernel has the key.
func (l *Local) GrowLUKS(ctx context.Context, m Mapped) (Mapped, error) {
	now, err := l.mapped(ctx, dmRequest{UUID: m.UUID}, "")
	if err == nil && now == nil {
		err = fault.New(fault.NotFound, "device %s went away", m.Name)
	}
	if err != nil {
		return m, err
	}
	below, header, ok := now.LUKS()
	if !ok {
		return m, fault.New(fault.InUse, "device %s has the table %q, where one target \"crypt\" belongs: find out who changed it", m.Name, tableText(now.Targets))
	}
	size, err := sysfsSize("/sys/dev/block/" + below)
	if err != nil {
		return m, err
	}
	if length := (size - header) / LUKSSector * LUKSSector; length > now.Size {
		now.Targets[0].Length, now.Targets[0].Secret = length, true
		if err := l.load(ctx, *now, now.ReadOnly, now.Targets); err != nil {
			return m, err
		}
		if err := l.ResumeMapped(ctx, m); err != nil {
			// The kernel has suspended the device, and refused the table: the old one goes on.
			after := context.WithoutCancel(ctx)
			return m, errors.Join(err, l.ClearMapped(after, m), l.ResumeMapped(after, m))
		}
	}
	grown, err := l.MappedByUUID(ctx, m.UUID)
	if err == nil && grown == nil {
		err = fault.New(fault.NotFound, "device %s went away", m.Name)
	}
	if err != nil {
		return m, err
	}
	return *grown, nil
}

// LUKS reads the table of a device that OpenLUKS made: the number of the device
// below, and where its payload begins, in bytes.
func (m Mapped) LUKS() (below string, header int64, ok bool) {
	if len(m.Targets) != 1 || m.Targets[0].Type != "crypt" {
		return "", 0, false
	}
	w := strings.Fields(m.Targets[0].Params) // cipher, key, IV's offset, device, start, options
	if len(w) < 5 {
		return "", 0, false
	}
	start, err := strconv.ParseInt(w[4], 10, 64)
	return w[3], start * sector, err == nil
}

func deviceSize(device string) (int64, error) {
	return sysfsSize("/sys/class/block/" + device[strings.LastIndexByte(device, '/')+1:])
}

func sysfsSize(dir string) (int64, error) {
	b, err := os.ReadFile(dir + "/size")
	if err != nil {
		return 0, ioError("measure", dir, err)
	}
	sectors, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return sectors * sector, fault.Wrap(fault.Internal, err)
}

// luksHeader is what matters of a header's JSON; see LUKS2's on-disk format.
type luksHeader struct {
	Segments map[string]struct {
		Type       string          `json:"type"`
		Offset     string          `json:"offset"`
		Size       string          `json:"size"`
		IVTweak    string          `json:"iv_tweak"`
		Encryption string          `json:"encryption"`
		SectorSize int             `json:"sector_size"`
		Integrity  json.RawMessage `json:"integrity"`
	} `json:"segments"`
	Config struct {
		Requirements json.RawMessage `json:"requirements"`
	} `json:"config"`
}

// segment reads how the payload is encrypted, and refuses what FormatLUKS does not make.
func (l *Local) segment(ctx context.Context, device string, header int64) (cipher string, _ error) {
	if err := l.ReadDevice(ctx, device); err != nil { // what cannot be read is not without a header
		return "", err
	}
	res, err := l.run.Run(ctx, Command{Name: cryptsetup, Args: []string{"luksDump", noLocks, "--dump-json-metadata", "--", device}, Timeout: openTimeout})
	var exit *ExitError
	if errors.As(err, &exit) && exit.Result.ExitCode == 1 {
		return "", fault.New(fault.Corrupt, "%s is no LUKS2 device: its header is gone or damaged (%s)", device, lastLine(exit.Result.Stderr))
	}
	if err != nil {
		return "", luksError("read the LUKS2 header of", device, err)
	}
	return parseSegment(res.Stdout, device, header)
}

func parseSegment(text []byte, device string, header int64) (cipher string, _ error) {
	var h luksHeader
	if err := json.Unmarshal(text, &h); err != nil {
		return "", fault.New(fault.Corrupt, "the LUKS2 header of %s: %w", device, err)
	}
	s, ok := h.Segments["0"]
	switch {
	case !ok || len(h.Segments) != 1 || h.Config.Requirements != nil || s.Integrity != nil:
		return "", fault.New(fault.Corrupt, "the LUKS2 header of %s is not one that Quarry makes: it has %d segments, or needs what Quarry does not do (a reencryption under way, integrity)", device, len(h.Segments))
	case s.Type != "crypt" || s.Size != "dynamic" || s.IVTweak != "0" || s.SectorSize != LUKSSector:
		return "", fault.New(fault.Corrupt, "the LUKS2 header of %s is not one that Quarry makes: its segment is %s of size %s with sectors of %d bytes", device, s.Type, s.Size, s.SectorSize)
	case s.Offset != strconv.FormatInt(header, 10):
		return "", fault.New(fault.Corrupt, "the LUKS2 header of %s says that the data begins at byte %s, and %d was recorded", device, s.Offset, header)
	case strings.ContainsAny(s.Encryption, " \t\n"):
		return "", fault.New(fault.Corrupt, "the LUKS2 header of %s names the cipher %q", device, s.Encryption)
	}
	return s.Encryption, nil
}

// volumeKey opens a header with a passphrase: the key in hexadecimal digits.
func (l *Local) volumeKey(ctx context.Context, device string, passphrase Secret) (string, error) {
	res, err := l.run.Run(ctx, Command{Name: cryptsetup, Stdin: strings.NewReader(string(passphrase)), Timeout: openTimeout,
		Args: []string{"luksDump", noLocks, "--dump-volume-key", "--batch-mode", "--key-file=-", "--", device}})
	defer clear(res.Stdout)
	if err != nil {
		return "", luksError("open the LUKS2 header of", device, err)
	}
	return parseVolumeKey(res.Stdout, device)
}

// Before 2.7 cryptsetup says "MK".
var keyDump = regexp.MustCompile(`(?m)^(?:MK|Volume key) dump:((?:\s+[0-9a-f]{2}\b)+)`)

func parseVolumeKey(text []byte, device string) (string, error) {
	m := keyDump.FindSubmatch(text)
	if m == nil {
		return "", fault.New(fault.Internal, "cryptsetup shows the key of %s in a form that this version of Quarry does not know", device)
	}
	key := strings.Join(strings.Fields(string(m[1])), "")
	if b, err := hex.DecodeString(key); err != nil || len(b) != 32 && len(b) != 64 {
		return "", fault.New(fault.Internal, "cryptsetup shows a key of %s with %d digits", device, len(key))
	}
	return key, nil
}

// luksError is about a cryptsetup that failed: its status and what it complained
// of, never what it printed. cryptsetup(8), "Return codes".
func luksError(what, device string, err error) error {
	var exit *ExitError
	if !errors.As(err, &exit) {
		return err
	}
	said := lastLine(exit.Result.Stderr)
	switch exit.Result.ExitCode {
	case 2:
		return fault.New(fault.Permission, "%s %s: the passphrase is wrong (%s)", what, device, said)
	case 3, -1: // -1: killed, and not by us
		return fault.New(fault.Exhausted, "%s %s: cryptsetup got no memory: argon2id takes 64 MiB, raise the container's limit (%s)", what, device, said)
	case 5:
		return fault.New(fault.InUse, "%s %s: %s", what, device, said)
	}
	return fault.New(fault.Unavailable, "%s %s: cryptsetup ended with status %d: %s", what, device, exit.Result.ExitCode, said)
}

func lastLine(b []byte) string {
	said := strings.TrimSpace(string(b))
	return said[strings.LastIndexByte(said, '\n')+1:]
}
