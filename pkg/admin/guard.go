package admin

import (
	"net"
	"net/http"
	"net/netip"

	"github.com/quarry-csi/quarry/pkg/fault"
)

const (
	// clientHeader is what every client sends. A page in a browser cannot, for another
	// origin than its own: it would have to ask first (CORS), and is not allowed to.
	clientHeader = "Quarry-Admin"
	// clientHost is the host of a client's made-up URL.
	clientHost = "quarry"
)

// Guard keeps web pages away from h where a browser could reach it. A Unix socket's
// permissions do that by themselves; a loopback address is also reached from pages that are
// open beside a port-forward, by their own scripts or by a name that suddenly means
// 127.0.0.1 (DNS rebinding).
func Guard(l net.Listener, h http.Handler) http.Handler {
	if l.Addr().Network() == "unix" {
		return h
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var err error
		switch {
		case !ownHost(r.Host):
			err = fault.New(fault.Permission, "host %q is not Quarry's: ask by a loopback address, such as 127.0.0.1", r.Host)
		case r.Header.Get(clientHeader) == "":
			err = fault.New(fault.Permission, "the header %q is missing: any value will do, it tells that this is no web page", clientHeader)
		case r.Header.Get("Origin") != "":
			err = fault.New(fault.Permission, "the request is a web page's, of %q: pages are not answered", r.Header.Get("Origin"))
		}
		if err != nil {
			answer(func(*http.Request) (any, error) { return nil, err })(w, r)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// ownHost says whether a Host header can only be that of somebody who dials a loopback
// address on purpose.
func ownHost(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if host == clientHost || host == "localhost" {
		return true
	}
	if n := len(host); n > 2 && host[0] == '[' && host[n-1] == ']' {
		host = host[1 : n-1]
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.IsLoopback()
}
