package nfs

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// words are a reply's, after the call's number.
func words(w ...uint32) func(call []byte) []byte {
	return func(call []byte) []byte {
		reply := append([]byte{}, call[4:8]...)
		for _, w := range w {
			reply = binary.BigEndian.AppendUint32(reply, w)
		}
		return append(binary.BigEndian.AppendUint32(nil, uint32(len(reply))|lastRecord), reply...)
	}
}

// server answers every call with what reply makes of it, and hangs where that is nil. It returns its port.
func server(t *testing.T, reply func(call []byte) []byte) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				call := make([]byte, 44)
				if _, err := io.ReadFull(conn, call); err != nil {
					return
				}
				if reply == nil {
					_, _ = conn.Read(call)
					return
				}
				_, _ = conn.Write(reply(call))
			}()
		}
	}()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// TestWhatAServerSays: each answer, and each way of giving none, has its error within its time.
func TestWhatAServerSays(t *testing.T) {
	closed := server(t, nil)
	for name, s := range map[string]struct {
		port string
		kind fault.Kind
		says string
	}{
		"it is there":               {port: server(t, words(rpcReply, rpcAccepted, 0, 0, rpcSuccess))},
		"it is there, and verbose":  {port: server(t, words(rpcReply, rpcAccepted, 6, 5, 1, 2, rpcSuccess))},
		"it wants credentials":      {port: server(t, words(rpcReply, 1, 1, 5))},
		"it has another version":    {server(t, words(rpcReply, rpcAccepted, 0, 0, rpcMismatch, 4, 4)), fault.Unsupported, "has no NFS version 3: it has version 4 only"},
		"it has other versions":     {server(t, words(rpcReply, rpcAccepted, 0, 0, rpcMismatch, 1, 2)), fault.Unsupported, "it has versions 1 to 2"},
		"it is another RPC service": {server(t, words(rpcReply, rpcAccepted, 0, 0, rpcNoSuch)), fault.Unsupported, "has no NFS service at that port"},
		"it has trouble":            {server(t, words(rpcReply, rpcAccepted, 0, 0, 5)), fault.Unavailable, "RPC error 5"},
		"it speaks HTTP":            {server(t, func([]byte) []byte { return []byte("HTTP/1.1 400 Bad Request\r\n\r\n") }), fault.Unavailable, "no answer in ONC RPC"},
		"it sends a huge answer":    {server(t, func([]byte) []byte { return []byte{0xff, 0xff, 0xff, 0xff} }), fault.Unavailable, "no answer in ONC RPC"},
		"it sends half an answer":   {server(t, func(call []byte) []byte { return words(rpcReply, rpcAccepted)(call)[:10] }), fault.Unavailable, "does not answer"},
		"it ends in the middle":     {server(t, words(rpcReply, rpcAccepted, 0, 4096, rpcSuccess)), fault.Unavailable, "no answer in ONC RPC"},
		"it answers somebody else":  {server(t, func(call []byte) []byte { return words(rpcReply, rpcAccepted, 0, 0, 0)(make([]byte, 44)) }), fault.Unavailable, "no answer in ONC RPC"},
		"it hangs":                  {closed, fault.Unavailable, "gave no answer within"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			x := Export{Server: "127.0.0.1", Options: []string{"port=" + s.port}}
			at, err := x.Reach(ctx, 3)
			if s.says == "" {
				if err != nil || at.String() != "127.0.0.1" {
					t.Errorf("%v, %v", at, err)
				}
				return
			}
			if err == nil || fault.KindOf(err) != s.kind || !strings.Contains(err.Error(), s.says) || !strings.Contains(err.Error(), "127.0.0.1:"+s.port) {
				t.Errorf("error %v, want kind %v, the address and %q", err, s.kind, s.says)
			}
		})
	}
}

// TestNobodyIsThere: a port where nobody listens, and a name that nobody has, are told apart.
func TestNobodyIsThere(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	l.Close()
	_, err = Export{Server: "127.0.0.1", Options: []string{"port=" + port}}.Reach(t.Context(), 3)
	if fault.KindOf(err) != fault.Unavailable || !strings.Contains(err.Error(), "refuses the connection") {
		t.Error(err)
	}
	_, err = Export{Server: "no-such-host.invalid"}.Reach(t.Context(), 3)
	if fault.KindOf(err) != fault.Unavailable || !strings.Contains(err.Error(), `"no-such-host.invalid"`) {
		t.Error(err)
	}
}

// TestARefusalOfTheKernelIsExplained: the mount call answers with a number only.
func TestARefusalOfTheKernelIsExplained(t *testing.T) {
	for errno, want := range map[unix.Errno]struct {
		kind fault.Kind
		says string
	}{
		unix.ENOENT:          {fault.NotFound, "no such export"},
		unix.EACCES:          {fault.Permission, "not to this host"},
		unix.EPROTONOSUPPORT: {fault.Unsupported, "does not have this version"},
		unix.ECONNREFUSED:    {fault.Unavailable, "rpcbind and mountd"},
		unix.ETIMEDOUT:       {fault.Unavailable, "does not answer"},
		unix.ENOKEY:          {fault.Permission, "keytab"},
	} {
		err := explain(fault.New(fault.Unavailable, "mount nas:/x (nfs) on /t: %w", errno), "nas:/x")
		if fault.KindOf(err) != want.kind || !strings.Contains(err.Error(), want.says) || !strings.Contains(err.Error(), "nas:/x") || strings.Contains(err.Error(), "/t:") {
			t.Errorf("%v: %v", errno, err)
		}
	}
	other := fmt.Errorf("something else")
	if explain(other, "nas:/x") != other || explain(nil, "") != nil {
		t.Error("what is not known is changed")
	}
}
