package smb

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// answerLimit is how long a server may take to connect and to answer the first request. A kernel
// accepts connections for a server that hangs, so a connection alone says little.
const answerLimit = 5 * time.Second

// Parts of SMB2 NEGOTIATE, the only request that is made here and not by the kernel. All
// sections are those of [MS-SMB2].
const (
	headerSize         = 64         // 2.2.1.2
	statusNotSupported = 0xC00000BB // 3.3.5.4: no version in common
	contextPreauth     = 1          // 2.2.3.1.1
	contextEncryption  = 2          // 2.2.3.1.2
	maxAnswer          = 64 << 10   // a fraction of it is usual
)

// negotiate asks a server which of the versions it would speak: the highest that it has. It
// leaves nothing behind. fault.Unavailable: it does not answer now. fault.Invalid: it has none of
// them, or is no SMB server.
func negotiate(ctx context.Context, server netip.AddrPort, offer []dialect) (dialect, error) {
	limited, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(limited, "tcp", server.String())
	if err != nil {
		return 0, silent(ctx, server, err)
	}
	defer conn.Close()
	defer context.AfterFunc(limited, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })() // whatever waits ends
	if _, err := conn.Write(negotiateRequest(offer)); err != nil {
		return 0, silent(ctx, server, err)
	}
	answer, err := readAnswer(conn)
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return 0, fault.New(fault.Unavailable, "%s closed the connection after the first request: it refuses this node, or speaks SMB 1 only", server)
	case errors.Is(err, errNoSMB):
		return 0, fault.New(fault.Invalid, "%s is no server of SMB 2 or 3: %w", server, err)
	case err != nil:
		return 0, silent(ctx, server, err)
	}
	return parseAnswer(server, answer, offer)
}

// silent is the error for a server that does not answer. ctx is the caller's.
func silent(ctx context.Context, server netip.AddrPort, err error) error {
	if ctx.Err() != nil {
		return fault.New(fault.KindOf(ctx.Err()), "%s did not answer yet: %w", server, ctx.Err())
	}
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return fault.New(fault.Unavailable, "%s does not answer: nothing came back within %s", server, answerLimit)
	}
	return fault.New(fault.Unavailable, "%s does not answer: %w", server, err)
}

// negotiateRequest renders SMB2 NEGOTIATE (2.2.3) with its length before it.
func negotiateRequest(offer []dialect) []byte {
	le := binary.LittleEndian
	b := make([]byte, headerSize, 256)
	copy(b, "\xfeSMB")
	le.PutUint16(b[4:], headerSize)
	le.PutUint16(b[14:], 1) // credits asked for
	b = le.AppendUint16(b, 36)
	b = le.AppendUint16(b, uint16(len(offer)))
	b = le.AppendUint16(b, 1) // signing is possible
	b = le.AppendUint16(b, 0)
	b = le.AppendUint32(b, 0x40) // encryption is, too
	id := make([]byte, 16+32)    // the client's ID, and salt
	_, _ = rand.Read(id)         // never fails
	b = append(b, id[:16]...)
	contexts := len(b)
	b = append(b, make([]byte, 8)...)
	for _, d := range offer {
		b = le.AppendUint16(b, uint16(d))
	}
	for _, d := range offer {
		if d == smb311 {
			b = pad(b)
			le.PutUint32(b[contexts:], uint32(len(b)))
			le.PutUint16(b[contexts+4:], 2)
			b = appendContext(b, contextPreauth, append([]byte{1, 0, 32, 0, 1, 0}, id[16:]...)) // SHA-512
			b = appendContext(pad(b), contextEncryption, []byte{2, 0, 2, 0, 1, 0})              // AES-128 GCM, CCM
		}
	}
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
}

func appendContext(b []byte, kind uint16, data []byte) []byte {
	b = binary.LittleEndian.AppendUint16(b, kind)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(data)))
	return append(append(b, 0, 0, 0, 0), data...)
}

// pad brings a message's length to a multiple of 8.
func pad(b []byte) []byte { return append(b, make([]byte, (8-len(b)%8)%8)...) }

var errNoSMB = errors.New("its answer is another protocol's")

// readAnswer reads one message without its length.
func readAnswer(r io.Reader) ([]byte, error) {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(length[:])
	if size < headerSize+8 || size > maxAnswer {
		return nil, errNoSMB
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, err
	}
	if !strings.HasPrefix(string(b), "\xfeSMB") || binary.LittleEndian.Uint16(b[12:]) != 0 {
		return nil, errNoSMB
	}
	return b, nil
}

// parseAnswer finds the version in an answer (2.2.4).
func parseAnswer(server netip.AddrPort, b []byte, offer []dialect) (dialect, error) {
	var names []string
	for _, d := range offer {
		names = append(names, d.String())
	}
	asked := strings.Join(names, ", ")
	switch status := binary.LittleEndian.Uint32(b[8:]); {
	case status == statusNotSupported:
		return 0, fault.New(fault.Invalid, "%s does not offer SMB %s", server, asked)
	case status != 0:
		return 0, fault.New(fault.Unavailable, "%s refuses to begin with SMB %s: status %#08x", server, asked, status)
	}
	got := dialect(binary.LittleEndian.Uint16(b[headerSize+4:]))
	for _, d := range offer {
		if d == got {
			return got, nil
		}
	}
	return 0, fault.New(fault.Invalid, "%s answers with SMB %s, and was asked for %s", server, got, asked)
}
