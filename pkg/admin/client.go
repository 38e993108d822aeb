package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Client asks a running Quarry.
type Client struct {
	where string // for errors
	http  *http.Client
}

// NewClient makes a client; nothing is dialed until it is asked.
func NewClient(e Endpoint) *Client { return NewClientOver(e.String(), e.dial) }

// NewClientOver makes a client that reaches Quarry by dial; where names that in errors.
func NewClientOver(where string, dial func(context.Context) (net.Conn, error)) *Client {
	return &Client{where: where, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
	}}}
}

// Version of the Quarry that answers.
func (c *Client) Version(ctx context.Context) (Version, error) {
	return ask[Version](ctx, c, http.MethodGet, "/v1/version", nil, nil)
}

// Domains as configured, by name.
func (c *Client) Domains(ctx context.Context) ([]Domain, error) {
	return ask[[]Domain](ctx, c, http.MethodGet, "/v1/domains", nil, nil)
}

// Images of all open domains, in every state, by handle.
func (c *Client) Images(ctx context.Context) ([]Image, error) {
	return ask[[]Image](ctx, c, http.MethodGet, "/v1/images", nil, nil)
}

// Chain of the image with a handle, the unique beginning of one, or a CSI name.
func (c *Client) Chain(ctx context.Context, img string) (Chain, error) {
	return ask[Chain](ctx, c, http.MethodGet, "/v1/chain", url.Values{"image": {img}}, nil)
}

// Operations under way, oldest first.
func (c *Client) Operations(ctx context.Context) ([]Operation, error) {
	return ask[[]Operation](ctx, c, http.MethodGet, "/v1/operations", nil, nil)
}

// Usage by namespace and domain, in that order.
func (c *Client) Usage(ctx context.Context) ([]NamespaceUsage, error) {
	return ask[[]NamespaceUsage](ctx, c, http.MethodGet, "/v1/usage", nil, nil)
}

// Check a domain (name or ID), or all for "".
func (c *Client) Check(ctx context.Context, domain string) (Checked, error) {
	return ask[Checked](ctx, c, http.MethodGet, "/v1/check", url.Values{"domain": {domain}}, nil)
}

// Fix what a check finds, or tell what would be done.
func (c *Client) Fix(ctx context.Context, r FixRequest) (FixResult, error) {
	return ask[FixResult](ctx, c, http.MethodPost, "/v1/fix", nil, r)
}

// Import makes a volume of what lies in a domain's storage.
func (c *Client) Import(ctx context.Context, r ImportRequest) (Imported, error) {
	return ask[Imported](ctx, c, http.MethodPost, "/v1/import", nil, r)
}

func ask[T any](ctx context.Context, c *Client, method, path string, query url.Values, body any) (T, error) {
	var out T
	var send io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return out, fault.Wrap(fault.Internal, err)
		}
		send = bytes.NewReader(data)
	}
	u := url.URL{Scheme: "http", Host: clientHost, Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), send)
	if err != nil {
		return out, fault.Wrap(fault.Internal, err)
	}
	req.Header.Set(clientHeader, "1")
	resp, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return out, fault.New(fault.KindOf(ctx.Err()), "quarry on %s: %w", c.where, ctx.Err())
		}
		var made *url.Error
		if errors.As(err, &made) {
			err = made.Err // without the made-up URL
		}
		if known := new(fault.Error); errors.As(err, &known) { // the way there says it all
			return out, known
		}
		return out, fault.New(fault.Unavailable, "quarry does not answer on %s: %w", c.where, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
			return out, fault.New(fault.Unavailable, "the answer of %s is not Quarry's, or was cut off: %w", c.where, err)
		}
		return out, nil
	}
	var fail failure
	if err := json.NewDecoder(resp.Body).Decode(&fail); err != nil || fail.Error.Message == "" {
		return out, fault.New(fault.Internal, "%s answers %s: it may not be Quarry's admin endpoint", c.where, resp.Status)
	}
	return out, fault.New(kindNamed(fail.Error.Kind), "%s", fail.Error.Message)
}

// kindNamed is the reverse of Kind.String; an unknown name is Internal.
func kindNamed(name string) fault.Kind {
	for k := fault.Internal; k <= fault.Deadline; k++ {
		if k.String() == name {
			return k
		}
	}
	return fault.Internal
}
