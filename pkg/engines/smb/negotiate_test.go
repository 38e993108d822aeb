package smb

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/test/lab/samba"
)

func at(t *testing.T, s *samba.Server) netip.AddrPort {
	t.Helper()
	a, err := netip.ParseAddrPort(s.Address())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestSambaSpeaksEveryVersionThatQuarryKnows(t *testing.T) {
	server := at(t, samba.Start(t, nil))
	for _, want := range dialects() {
		if got, err := negotiate(t.Context(), server, []dialect{want}); err != nil || got != want {
			t.Errorf("asked for %v it answers %v, %v", want, got, err)
		}
	}
	if got, err := negotiate(t.Context(), server, dialects()); err != nil || got != smb311 {
		t.Errorf("asked for any it answers %v, %v, not the highest", got, err)
	}
}

func TestAnOldServerIsSpokenToInItsOwnVersionAndNoOther(t *testing.T) {
	server := at(t, samba.Start(t, []string{"server max protocol = SMB2_10"}))
	if got, err := negotiate(t.Context(), server, dialects()); err != nil || got != smb210 {
		t.Errorf("asked for any it answers %v, %v", got, err)
	}
	_, err := negotiate(t.Context(), server, []dialect{smb300})
	if !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "does not offer SMB 3.0") {
		t.Errorf("asked for 3.0 the error is %v", err)
	}
}

func TestAFrozenServerIsGivenUpInSeconds(t *testing.T) {
	s := samba.Start(t, nil)
	s.Freeze(t)
	defer s.Thaw(t)
	begin := time.Now()
	_, err := negotiate(t.Context(), at(t, s), dialects())
	if !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "nothing came back within 5s") {
		t.Errorf("the error is %v", err)
	}
	if took := time.Since(begin); took > 2*answerLimit {
		t.Errorf("it took %s", took)
	}
}

func TestNobodyListens(t *testing.T) {
	s := samba.Start(t, nil)
	s.Kill()
	_, err := negotiate(t.Context(), at(t, s), dialects())
	if !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("the error is %v", err)
	}
}

func TestWhoeverGivesUpIsNotKeptWaiting(t *testing.T) {
	server := fake(t, func(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := negotiate(ctx, server, dialects()); !errors.Is(err, fault.Deadline) {
		t.Errorf("the error is %v", err)
	}
}

func TestAnswersOfOthersAreRefused(t *testing.T) {
	message := func(change func(b []byte)) []byte {
		b := make([]byte, headerSize+65)
		copy(b, "\xfeSMB")
		binary.LittleEndian.PutUint16(b[headerSize+4:], uint16(smb311))
		change(b)
		return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
	}
	for name, c := range map[string]struct {
		answer []byte
		kind   fault.Kind
		says   string
	}{
		"web server":     {[]byte("HTTP/1.1 400 Bad Request\r\n\r\n"), fault.Invalid, "no server of SMB"},
		"nothing":        {nil, fault.Unavailable, "closed the connection"},
		"half":           {message(func([]byte) {})[:40], fault.Unavailable, "closed the connection"},
		"short":          {append([]byte{0, 0, 0, 4}, "\xfeSMB"...), fault.Invalid, "no server of SMB"},
		"huge":           {[]byte{0, 0xff, 0xff, 0xff}, fault.Invalid, "no server of SMB"},
		"SMB 1":          {message(func(b []byte) { b[0] = 0xff }), fault.Invalid, "no server of SMB"},
		"other command":  {message(func(b []byte) { b[12] = 1 }), fault.Invalid, "no server of SMB"},
		"other version":  {message(func(b []byte) { b[headerSize+4] = 0x99 }), fault.Invalid, "answers with SMB 0x0399"},
		"other status":   {message(func(b []byte) { b[8] = 1 }), fault.Unavailable, "status 0x00000001"},
		"SMB 3.1.1 fits": {message(func([]byte) {}), 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			server := fake(t, func(conn net.Conn) {
				_, _ = conn.Read(make([]byte, 1024))
				_, _ = conn.Write(c.answer)
			})
			_, err := negotiate(t.Context(), server, dialects())
			if c.says == "" {
				if err != nil {
					t.Errorf("the error is %v", err)
				}
			} else if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("the error is %v; it should be %v and say %q", err, c.kind, c.says)
			}
		})
	}
}

// fake serves one connection.
func fake(t *testing.T, serve func(net.Conn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		if conn, err := l.Accept(); err == nil {
			serve(conn)
			conn.Close()
		}
	}()
	return netip.MustParseAddrPort(l.Addr().String())
}
