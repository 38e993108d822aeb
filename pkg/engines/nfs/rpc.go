package nfs

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// answerLimit is how long a server may take to answer a question that needs no disk.
const answerLimit = 5 * time.Second

// What ONC RPC calls things (RFC 5531), and the number of the NFS program (RFC 1813).
const (
	rpcVersion  = 2
	rpcCall     = 0
	rpcReply    = 1
	rpcAccepted = 0
	rpcSuccess  = 0
	rpcNoSuch   = 1 // PROG_UNAVAIL
	rpcMismatch = 2 // PROG_MISMATCH
	nfsProgram  = 100003
	lastRecord  = 1 << 31 // of a record's length: no fragment follows
	longestWord = 4 << 10 // no answer to NULL has more
)

// ask asks a server for the NULL procedure of an NFS version: it does nothing, needs no rights, and is answered
// by the threads that serve files. A connection alone would say less: the kernel accepts it while all
// threads hang.
func ask(ctx context.Context, server netip.AddrPort, version uint32) error {
	begin := time.Now()
	limit := begin.Add(answerLimit)
	if d, ok := ctx.Deadline(); ok && d.Before(limit) {
		limit = d
	}
	unanswered := func(err error) error {
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
			return fault.New(fault.Unavailable, "server %s gave no answer within %s", server, limit.Sub(begin).Round(100*time.Millisecond))
		}
		if errors.Is(err, unix.ECONNREFUSED) {
			return fault.New(fault.Unavailable, "server %s refuses the connection: no NFS service listens there now", server)
		}
		return fault.New(fault.Unavailable, "server %s does not answer: %w", server, err)
	}
	dialer := net.Dialer{Deadline: limit}
	conn, err := dialer.DialContext(ctx, "tcp", server.String())
	if err != nil {
		return unanswered(err)
	}
	defer conn.Close() // nothing is lost
	if err := conn.SetDeadline(limit); err != nil {
		return unanswered(err)
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	call := nullCall(version)
	if _, err := conn.Write(call); err != nil {
		return unanswered(err)
	}
	reply, err := readRecord(conn)
	if ctx.Err() != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fault.Wrap(fault.KindOf(ctx.Err()), ctx.Err())
	}
	if err != nil {
		return unanswered(err)
	}
	return understand(server, call[4:8], version, reply)
}

// nullCall is the record of a call of NULL: its length, a random number, and no credentials.
func nullCall(version uint32) []byte {
	words := []uint32{0, rpcCall, rpcVersion, nfsProgram, version, 0, 0, 0, 0, 0}
	call := binary.BigEndian.AppendUint32(nil, uint32(4*len(words))|lastRecord)
	for _, w := range words {
		call = binary.BigEndian.AppendUint32(call, w)
	}
	_, _ = rand.Read(call[4:8]) // never fails
	return call
}

func readRecord(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size&lastRecord == 0 || size&^lastRecord > longestWord {
		return nil, errors.New("what it sent is no answer in ONC RPC")
	}
	record := make([]byte, size&^lastRecord)
	_, err := io.ReadFull(r, record)
	return record, err
}

// understand says what a reply means: number, type, accepted or denied, a verifier, what became of the call.
func understand(server netip.AddrPort, number []byte, version uint32, reply []byte) error {
	strange := fault.New(fault.Unavailable, "server %s: what it sent is no answer in ONC RPC: is another service there?", server)
	word := func() (w uint32, ok bool) {
		if len(reply) < 4 {
			return 0, false
		}
		w, reply = binary.BigEndian.Uint32(reply), reply[4:]
		return w, true
	}
	if id, ok := word(); !ok || id != binary.BigEndian.Uint32(number) {
		return strange
	}
	if kind, ok := word(); !ok || kind != rpcReply {
		return strange
	}
	if state, ok := word(); !ok {
		return strange
	} else if state != rpcAccepted {
		return nil // it wants credentials even for nothing; but it answers
	}
	_, _ = word() // the verifier's flavour
	length, ok := word()
	padded := (int64(length) + 3) / 4 * 4
	if !ok || padded > int64(len(reply)) {
		return strange
	}
	reply = reply[padded:]
	switch state, ok := word(); {
	case !ok:
		return strange
	case state == rpcSuccess:
		return nil
	case state == rpcNoSuch:
		return fault.New(fault.Unsupported, "server %s answers, and has no NFS service at that port", server)
	case state == rpcMismatch:
		low, _ := word()
		high, ok := word()
		if !ok {
			return strange
		}
		if low == high {
			return fault.New(fault.Unsupported, "server %s has no NFS version %d: it has version %d only", server, version, low)
		}
		return fault.New(fault.Unsupported, "server %s has no NFS version %d: it has versions %d to %d", server, version, low, high)
	default:
		return fault.New(fault.Unavailable, "server %s answers NFS version %d with RPC error %d", server, version, state)
	}
}
