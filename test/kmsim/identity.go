package kmsim

import (
	"fmt"
	"html"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// isIdentityPath tells whether a call is to a service that gives out credentials: AWS's STS,
// whose calls are forms sent to /, and Microsoft's login.
func isIdentityPath(r *http.Request) bool {
	return r.URL.Path == "/" && r.Method == http.MethodPost ||
		strings.HasPrefix(r.URL.Path, "/"+Tenant+"/")
}

func (s *Sim) answerIdentity(r *request) answer {
	if r.URL.Path == "/" {
		return s.answerSTS(r)
	}
	return s.answerLogin(r)
}

// formValue is a field of the form that is the body; a body that is no form has none.
func (r *request) formValue(name string) string {
	form, err := url.ParseQuery(string(r.body))
	if err != nil {
		return ""
	}
	return form.Get(name)
}

// stsLife is how long an assumed role's credentials hold.
const stsLife = time.Hour

// answerSTS speaks the one call of AWS's STS that there is a use for here.
func (s *Sim) answerSTS(r *request) answer {
	role := r.formValue("RoleArn")
	r.entry = Entry{Protocol: AWS, Op: r.formValue("Action"), Key: role, Principal: s.nameOf(accessKey(r.Header.Get("Authorization")))}
	header := map[string]string{"Content-Type": "text/xml", "X-Amzn-Requestid": r.id}
	switch {
	case r.formValue("Action") != "AssumeRole" || role == "":
		return answer{status: http.StatusBadRequest, code: "InvalidAction", header: header, body: stsError("InvalidAction", r.id)}
	case r.fault == BadIdentity:
		return answer{status: http.StatusForbidden, code: "AccessDenied", header: header, body: stsError("AccessDenied", r.id)}
	}
	id := s.giveCredential("ASIA", role+"/"+r.formValue("RoleSessionName"))
	const ns = "https://sts.amazonaws.com/doc/2011-06-15/"
	return answer{header: header, body: fmt.Sprintf(`<AssumeRoleResponse xmlns="%s"><AssumeRoleResult>`+
		`<AssumedRoleUser><AssumedRoleId>AROA:holdfast</AssumedRoleId><Arn>%s</Arn></AssumedRoleUser>`+
		`<Credentials><AccessKeyId>%s</AccessKeyId><SecretAccessKey>simulated</SecretAccessKey><SessionToken>simulated</SessionToken><Expiration>%s</Expiration></Credentials>`+
		`</AssumeRoleResult><ResponseMetadata><RequestId>%s</RequestId></ResponseMetadata></AssumeRoleResponse>`,
		ns, html.EscapeString(role), id, time.Now().Add(stsLife).UTC().Format(time.RFC3339), r.id)}
}

func stsError(code, id string) string {
	return fmt.Sprintf(`<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type><Code>%s</Code><Message>not authorized</Message></Error><RequestId>%s</RequestId></ErrorResponse>`, code, id)
}
